"""Small data files of every kind, each written by its format's own library. Not a test file."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from PIL import Image

from vpgtrans.data.config import DataSource
from vpgtrans.data.rows import Rows
from vpgtrans.data.sources import Source, open_dataset
from vpgtrans.errors import DataError, Dropped

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
CAPTIONS = ["a red square", "a green square", "a blue square"]
COUNT = len(COLORS)


def png(color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [png(color) for color in COLORS]


def write_images(folder: Path) -> list[str]:
    """0.png, 1.png, … below `images`; returns their paths relative to the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(IMAGES):
        (folder / f"images/{number}.png").write_bytes(image)
    return [f"images/{number}.png" for number in range(COUNT)]


def write_parquet(path: Path, *, group: int | None = None, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_csv(path: Path, *rows: list[str], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)
    return path


def write_tar(path: Path, *samples: dict[str, Any]) -> Path:
    """By webdataset's own writer: `__key__`, and a member for each other key."""
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)
    return path


def captioned(**keys: list[Any]) -> list[dict[str, Any]]:
    """Records from columns."""
    return [dict(zip(keys, values, strict=True)) for values in zip(*keys.values(), strict=True)]


def opened(dataset: Path | str, **keys: Any) -> Source:
    return open_dataset(DataSource(dataset=str(dataset), **keys))


def counts(source: Source | Rows) -> tuple[int, int, int]:
    """How many rows are used, malformed, and dropped by a rule; anything but a DataError comes through."""
    used = bad = dropped = 0
    for row in range(len(source)):
        try:
            if isinstance(source, Source):
                source.open(source.sample(row))
            else:
                source.read(row)
        except Dropped:
            dropped += 1
        except DataError:
            bad += 1
        else:
            used += 1
    return used, bad, dropped


def check_squares(source: Source) -> None:
    """The three squares in order, whatever they were read from."""
    assert [source.caption(row) for row in range(len(source))] == CAPTIONS
    assert len({source.id(row) for row in range(COUNT)}) == COUNT
    for row, color in enumerate(COLORS):
        assert source.image(row).convert("RGB").getpixel((0, 0)) == color
    assert counts(source) == (COUNT, 0, 0)


insertions = st.sampled_from([b'"', b"[", b"]", b"{", b"}", b"\\", b",", b"x", b"{}", b"\n", b"\0", b"\xff"])
damages = st.lists(
    st.tuples(st.integers(0, 10**6), st.one_of(insertions, st.integers(0, 7), st.sampled_from(["delete", "cut"]))),
    min_size=1, max_size=3,
)  # fmt: skip
"""What to do to a file, and where: insert bytes, flip a bit, delete some bytes, cut all that follows."""


def damaged(content: bytes, damage: list[tuple[int, Any]]) -> bytes:
    changed = bytearray(content)
    for place, how in damage:
        place %= len(changed) + 1
        if isinstance(how, bytes):
            changed[place:place] = how
        elif how == "cut":
            del changed[place:]
        elif how == "delete":
            del changed[place : place + 3]
        elif place < len(changed):
            changed[place] ^= 1 << how
    return bytes(changed)
