"""Data to filter, and calls of the filter. Not a test file."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from commands import invoke
from PIL import Image, ImageDraw


def filtered(*arguments: str | Path) -> dict[str, Any]:
    result = invoke("data", "filter", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rows"] == sum(found[key] for key in ("kept", "left_out", "unreadable", "dropped"))
    return found


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_table(file: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), file, row_group_size=4)
    return file


def texts(file: Path, count: int = 10, **columns: Any) -> Path:
    return write_table(file, id=[f"t{n}" for n in range(count)], body=[f"text {n}" for n in range(count)], **columns)


def drawing(colour: str, *, size: int = 120, side: str = "left") -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    left = size // 8 if side == "left" else size // 2
    ImageDraw.Draw(image).ellipse((left, size // 4, left + size // 3, 3 * size // 4), fill=colour)
    return image
