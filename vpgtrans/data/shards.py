"""Samples written as parquet files or WebDataset tar shards, such that our own formats read them back."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from vpgtrans.data.sample import Sample
from vpgtrans.errors import DataError
from vpgtrans.prompts import IMAGE, Turn

Target = Literal["parquet", "webdataset"]
ENDINGS: dict[Target, str] = {"parquet": "parquet", "webdataset": "tar"}
GROUP_BYTES, GROUP_ROWS = 8 << 20, 1000
"""A row group of parquet ends behind the first of them: readers shuffle and load by row groups."""
_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
}


def columns(layout: str, target: Target, *, several: bool) -> dict[str, str]:
    """The keys of a data source that reads such shards back, as far as they are not the defaults."""
    said = {"question": {"question": "question", "answer": "answer"}, "caption": {}}.get(layout, {layout: layout})
    # a tar sample's images are members of their own, of which `image` is the first
    return said | ({"image": "images"} if several and target == "webdataset" else {})


def to_record(sample: Sample, layout: str, *, several: bool) -> dict[str, Any]:
    """A sample as a row: `id`, the layout's texts and, where it has any, `image` with encoded bytes.

    Args:
        several: `image` is a list.

    Raises:
        DataError: there are several images and no list for them.
    """
    record = {"id": sample.id, **_TEXTS[layout](sample)}
    if layout == "text":
        return record
    if several:
        return record | {"image": list(sample.images)}
    if len(sample.images) > 1:
        raise DataError(f"{len(sample.images)} images, but the first rows have one each; right would be --images list")
    return record | {"image": sample.images[0] if sample.images else None}


def _turns(sample: Sample) -> Sequence[Turn]:
    assert not isinstance(sample.text, str)
    return sample.text


def _question(sample: Sample) -> dict[str, Any]:
    asked = _turns(sample)[0].text
    bare = asked.removeprefix(f"{IMAGE * len(sample.images)}\n")
    # Where images stand in front alone, reading puts them there again.
    if sample.images and IMAGE not in bare and bare and bare == bare.strip():
        asked = bare
    return {"question": asked, "answer": list(sample.references)}


_TEXTS: dict[str, Any] = {
    "caption": lambda sample: {"caption": list(sample.references)},
    "question": _question,
    "conversation": lambda sample: {
        "conversation": [{"role": turn.role, "content": turn.text} for turn in _turns(sample)]
    },
    "document": lambda sample: {"document": _turns(sample)[0].text},
    "text": lambda sample: {"text": _turns(sample)[0].text},
}


class Writer(Protocol):
    """One shard that is being written."""

    def write(self, record: dict[str, Any], row: int) -> None: ...

    def close(self) -> None: ...


class ParquetShard:
    """Rows in row groups of a few megabytes; the same rows give the same bytes."""

    def __init__(self, path: Path, layout: str, *, several: bool):
        import pyarrow.parquet as pq

        self._schema = schema(layout, several=several)
        texts = [name for name in self._schema.names if name != "image"]
        self._writer = pq.ParquetWriter(
            path,
            self._schema,
            # Images are compressed as they are; statistics of whole images would only make the footer large.
            compression={name: "none" if name.startswith("image") else "zstd" for name in _leaves(self._schema)},
            use_dictionary=False,
            write_statistics=texts,
        )
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def write(self, record: dict[str, Any], row: int) -> None:
        self._rows.append(record)
        self._bytes += size_of(record)
        if self._bytes >= GROUP_BYTES or len(self._rows) >= GROUP_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0


def schema(layout: str, *, several: bool) -> Any:
    """Of a parquet shard."""
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    said = {
        "caption": {"caption": texts},
        "question": {"question": text, "answer": texts},
        "conversation": {"conversation": pa.list_(pa.struct([("role", text), ("content", text)]))},
    }.get(layout, {layout: text})
    image = {} if layout == "text" else {"image": pa.list_(pa.binary()) if several else pa.binary()}
    return pa.schema({"id": text, **image, **said})


def _leaves(table: Any) -> list[str]:
    """The columns as parquet stores them: `caption.list.element`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, table).close()
    stored = pq.ParquetFile(sink.getvalue()).schema
    return [stored.column(number).path for number in range(len(stored))]


class TarShard:
    """A tar of `000000012.jpg`, `000000012.txt` (a caption) and `000000012.json` (id and all texts)."""

    def __init__(self, path: Path, layout: str, *, several: bool):
        self._stream = path.open("wb")
        # No time of writing, and nobody's name: the same rows give the same bytes.
        self._writer = tar_writer()(self._stream, user="", group="", encoder=False, mtime=0)

    def write(self, record: dict[str, Any], row: int) -> None:
        said = {key: value for key, value in record.items() if key != "image"}
        member: dict[str, Any] = {"__key__": f"{row:09d}", "json": json.dumps(said, ensure_ascii=False).encode()}
        if record.get("caption"):
            member["txt"] = record["caption"][0].encode()
        image = record.get("image")
        if isinstance(image, list):
            # members come in the order of their names
            member |= {f"{number:04d}.{_ending(content)}": content for number, content in enumerate(image)}
        elif image is not None:
            member[_ending(image)] = image
        self._writer.write(member)

    def close(self) -> None:
        self._writer.close()
        self._stream.close()


def tar_writer() -> type[Any]:
    """
    Raises:
        DataError: webdataset is not installed.
    """
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise DataError(f"webdataset is not installed ({error}): pip install 'vpgtrans[webdataset]'") from error
    return TarWriter


def _ending(image: bytes) -> str:
    """The extension that goes with an image's first bytes."""
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    return next((ending for magic, ending in _MAGIC.items() if image.startswith(magic)), "img")


def size_of(record: Mapping[str, Any]) -> int:
    """Bytes of a row's images and texts, nearly."""
    image = record.get("image")
    images = image if isinstance(image, list) else [image]
    said = {key: value for key, value in record.items() if key != "image"}
    return sum(len(content) for content in images if content) + len(json.dumps(said, ensure_ascii=False).encode())


WRITERS: dict[Target, type[ParquetShard] | type[TarShard]] = {"parquet": ParquetShard, "webdataset": TarShard}
