"""WebDataset shards: tar files whose members with one stem are one sample (`0001.jpg`, `0001.txt`).

Shards are scanned once for where each member lies, which is kept in the user's cache; then any sample is read by its
place, from a disk or from any fsspec URL, and nothing has to be read in order.
"""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vpgtrans.data.rows import Rows, State
from vpgtrans.data.urls import reaching, resolve
from vpgtrans.errors import DataError
from vpgtrans.progress import track

_STATE = ("size", "mtime", "created", "ETag", "etag", "LastModified", "last_modified", "updated")
"""What file systems say about a file that tells a changed one."""
_LOCAL_STATE = ("size", "mtime")
"""Of a file on a disk: `created` changes with its mode or name there."""
_JSON = ("json",)
_TEXT = ("txt", "text", "caption", "cap", "cls", "transcript", "question", "answer")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "img")
"""Extensions of images; the first that a sample has is also found under the column `image`."""


class TarRows(Rows):
    """Samples of tar shards. A record holds a key per extension, `image` for the first image and `images` for all
    of them, `__key__`, and what a `.json` member says."""

    def __init__(self, urls: Sequence[str], name: str):
        """
        Raises:
            DataError: a shard that is missing, ends early, or holds absolute paths or `..`.
        """
        from fsspec.implementations.local import LocalFileSystem

        super().__init__(name)
        self.urls = list(urls)
        self._states: list[str] = []
        self._samples: list[Any] = []  # Arrow tables, mapped: key, members (extension, offset, size)
        for url in track(self.urls, f"{name}: shards"):
            filesystem, path = resolve(url)
            with reaching(url):
                about = filesystem.info(path)
            keys = _LOCAL_STATE if isinstance(filesystem, LocalFileSystem) else _STATE
            state = " ".join([url, *(str(about.get(key)) for key in keys)])
            self._states.append(state)
            self._samples.append(_index(url, filesystem, path, state))
        self._starts = np.cumsum([0, *(len(samples) for samples in self._samples)])
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def reopen(self) -> None:
        self._open = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def optional(self) -> Sequence[str]:
        return ("image", "images")

    def may_name_files(self, column: str) -> bool:
        """Where the shards hold images, these are the samples' images."""
        if any("://" in url for url in self.urls):
            return False  # a path there is none here, and reading every sample takes long
        found = (samples["extension"].combine_chunks().flatten().unique() for samples in self._samples)
        return not any(name.rpartition(".")[2] in IMAGES for names in found for name in names.to_pylist())

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(self._states).encode()).hexdigest()

    def content(self, state: State) -> str:
        """Shards that lie elsewhere count with what their store says of them."""
        from fsspec.implementations.local import LocalFileSystem

        digest = hashlib.sha256()
        for url, known in zip(self.urls, self._states, strict=True):
            filesystem, path = resolve(url)
            local = isinstance(filesystem, LocalFileSystem)
            digest.update(state(path, whole=True) if local else known.encode())
        return digest.hexdigest()

    def where(self, row: int) -> str:
        shard, place = self._locate(row)
        return f"{self.urls[shard]}, sample {self._samples[shard]['key'][place].as_py()!r}"

    def read(self, row: int) -> dict[str, Any]:
        shard, place = self._locate(row)
        sample = self._samples[shard].slice(place, 1).to_pylist()[0]
        record: dict[str, Any] = {"__key__": sample["key"], "id": f"{self.name}/{sample['key']}"}
        if twice := [name for name, count in Counter(sample["extension"]).items() if count > 1]:
            raise DataError(f"{self.where(row)}: more than one .{twice[0]}; right would be one sample a name")
        for extension, offset, size in zip(sample["extension"], sample["offset"], sample["size"], strict=True):
            last = extension.rpartition(".")[2]
            content: Any = self._bytes(shard, offset, size)
            if last in _JSON:
                try:
                    content = json.loads(content)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{self.where(row)}: .{extension} is no valid JSON ({error})") from error
                if isinstance(content, dict):
                    record |= content
            elif last in _TEXT:
                try:
                    content = content.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.where(row)}: .{extension} is no UTF-8 text ({error})") from error
                record.setdefault("caption", content)
            elif last in IMAGES:
                record.setdefault("image", content)
                record.setdefault("images", []).append(content)
            record[extension] = content
        return record

    def _locate(self, row: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return shard, row - int(self._starts[shard])

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._open:
            while len(self._open) >= 64:
                self._open.pop(next(iter(self._open)))
            self._open[shard] = resolve(self.urls[shard])
        filesystem, path = self._open[shard]
        with reaching(self.urls[shard]):
            content = filesystem.cat_file(path, start=offset, end=offset + size)
        if len(content) != size:
            raise DataError(f"{self.urls[shard]}: shorter than when it was opened")
        return content


def expand(pattern: str) -> list[str]:
    """`{000..099}` and `{a,b}` in a name or URL as names, a `::`-separated list as its parts."""
    from braceexpand import braceexpand

    try:
        return [name for part in _split(pattern) for name in braceexpand(part)]
    except ValueError as error:
        raise DataError(f"{pattern}: {error}; right would be {{000..099}} or {{a,b}}") from error


def _split(pattern: str) -> list[str]:
    return pattern.split("::")


def _index(url: str, filesystem: Any, path: str, state: str) -> Any:
    """Key and members of each sample of a shard, from the cache or by a scan: an Arrow table, mapped."""
    import pyarrow as pa

    from vpgtrans.references import cache_dir

    file = cache_dir() / "datasets/shards" / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.arrow"
    if not file.is_file():
        table = _scan(url, filesystem, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, file)
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def _scan(url: str, filesystem: Any, path: str) -> Any:
    import pyarrow as pa

    samples: dict[str, list[tuple[str, int, int]]] = {}
    count, end = 0, 0
    try:
        size = filesystem.info(path)["size"]
        with filesystem.open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                count += 1
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                end = member.offset_data + -(-member.size // 512) * 512
                if end > size:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isfile():
                    key, extension = _key(url, member.name)
                    if extension:
                        samples.setdefault(key, []).append((extension, member.offset_data, member.size))
                archive.members = []  # type: ignore[attr-defined]  # it keeps every header otherwise
        # What comes next must be the end's empty block: tarfile takes a damaged header for the end, too.
        block = filesystem.cat_file(path, start=end, end=min(size, end + 512))
        if len(block) < 512 or block.strip(b"\0"):
            raise tarfile.ReadError("a damaged header" if block else "no end mark")
    except DataError:
        raise
    except Exception as error:  # of the archive or, where it is a URL, of its file system
        raise DataError(
            f"{url}: the shard ends early or is damaged after {count} members ({len(samples)} samples): {error}; "
            "fetch it again, or leave it out"
        ) from error
    columns = {"key": list(samples)} | {
        name: [[member[place] for member in members] for members in samples.values()]
        for place, name in enumerate(("extension", "offset", "size"))
    }
    number = pa.list_(pa.int64())
    kinds = {"key": pa.string(), "extension": pa.list_(pa.string()), "offset": number, "size": number}
    return pa.table({name: pa.array(columns[name], kind) for name, kind in kinds.items()})


def _key(url: str, name: str) -> tuple[str, str]:
    """A member's sample and extension: `a/b.seg.png` is `a/b` and `seg.png`; a hidden file belongs to none."""
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{url}: member {name!r} has an absolute path or `..`; right would be a plain name")
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:
        return name, ""
    return (f"{folder}/{stem}" if folder else stem), extension.lower()
