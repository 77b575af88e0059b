"""A folder of images, each with a text of the same name beside it, or with one table for all of them."""

import hashlib
from pathlib import Path
from typing import Any

from vpgtrans.data.rows import Rows, State
from vpgtrans.data.tars import IMAGES
from vpgtrans.errors import DataError

SIDECARS = ("txt", "caption", "json")


class FolderRows(Rows):
    """`a.jpg` beside `a.txt` (or `.caption`, or `.json`), in any depth. A record has `id`, `image` and what the text or
    the object says. An image without a text is a row without a caption."""

    def __init__(self, folder: Path):
        super().__init__(str(folder))
        self._folder = folder
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        there = set(names)
        self._images = [name for name in names if name.suffix[1:].lower() in IMAGES]
        self._texts = [
            next((text for end in SIDECARS if (text := name.with_suffix(f".{end}")) in there), None)
            for name in self._images
        ]
        if not any(self._texts):
            raise DataError(
                f"{folder}: {len(self._images)} images, and none has a text of the same name beside it "
                f"({', '.join('.' + end for end in SIDECARS)})"
            )

    def __len__(self) -> int:
        return len(self._images)

    def may_name_files(self, column: str) -> bool:
        """Beside the images themselves, which the fingerprint covers: an object may name another one."""
        return any(text is not None and text.suffix == ".json" for text in self._texts)

    def content(self, state: State) -> str:
        """The texts count with their content; the images, which may be many and large, do not."""
        digest = hashlib.sha256()
        for image, text in zip(self._images, self._texts, strict=True):
            digest.update(f"{image}\0".encode("utf-8", "surrogateescape"))
            digest.update(state(self._folder / image, whole=False))
            if text is not None:
                digest.update(state(self._folder / text, whole=True))
        return digest.hexdigest()

    def where(self, row: int) -> str:
        return str(self._folder / self._images[row])

    def read(self, row: int) -> dict[str, Any]:
        import json

        record: dict[str, Any] = {"id": str(self._images[row]), "image": str(self._images[row])}
        text = self._texts[row]
        if text is None:
            return record | {"caption": None}
        file = self._folder / text
        try:
            content = file.read_text(encoding="utf-8")
            said = json.loads(content) if text.suffix == ".json" else {"caption": content}
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{file}: not readable ({error})") from error
        if not isinstance(said, dict):
            raise DataError(f"{file}: {type(said).__name__}; right would be an object with a caption")
        return record | said
