"""What a safetensors file says it holds, read without the tensors and without trusting a word of it.

8 bytes: n, little endian; n bytes of JSON: name -> dtype, shape, offsets; then the tensors' bytes. A file that passes
has every byte of its rest in exactly one tensor, so nothing hides between or behind them.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from vpgtrans.errors import IntegrityError

MAX_HEADER = 16 << 20
"""Bytes. A hundred thousand tensors take less."""
MAX_DIMENSIONS = 16
BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""dtype -> bytes a value."""
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    (b"\x80", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file"),
    (b"<", "a web page"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it."""

    dtype: str
    """One of `BYTES`."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes, counted from the end of the header."""
    end: int

    @property
    def kind(self) -> str:
        """Shape and dtype in a word: `BF16 [256, 576]`."""
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name.

    Raises:
        IntegrityError: it is no whole safetensors file, and why.
    """
    try:
        with path.open("rb") as stream:
            return header_of(stream, name=str(path))
    except OSError as error:
        raise IntegrityError(f"{path}: can't be read: {error.strerror or error}") from error


def header_of(stream: BinaryIO, *, name: str) -> dict[str, TensorInfo]:
    """As `read_header`, of a file that is open; name: what messages call it."""

    def refuse(problem: str) -> NoReturn:
        raise IntegrityError(f"{name}: is no whole safetensors file: {problem}")

    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    begin = stream.read(32)
    if len(begin) < 8:
        refuse(f"it has {size} bytes")
    length = int.from_bytes(begin[:8], "little")
    if begin[8:9] != b"{":
        found = next((what for magic, what in _MAGIC if begin.startswith(magic)), "something else")
        refuse(f"it begins as {found}")
    if length > MAX_HEADER:
        refuse(f"it claims a header of {length:,} bytes; at most {MAX_HEADER:,} are read")
    if length > size - 8:
        refuse(f"it claims a header of {length:,} bytes and has {size:,} in all")
    stream.seek(8)
    try:
        written = json.loads(stream.read(length), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        refuse(f"its header is no JSON: {' '.join(str(error).split())[:200]}")
    try:
        metadata = written.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text by name")
        tensors = {key: _tensor(key, value) for key, value in written.items()}
        _check_offsets(tensors, size - 8 - length)
    except ValueError as error:
        refuse(str(error))
    return tensors


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _tensor(name: str, value: Any) -> TensorInfo:
    if not name.isprintable():
        raise ValueError(f"the name {name[:80]!r} holds control characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]} has not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"{name[:80]}: the dtype {str(dtype)[:40]!r} is unknown")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]}: its shape and offsets are not lists of whole numbers")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    if info.end - info.start != math.prod(shape) * BYTES[dtype]:
        raise ValueError(f"{name[:80]}: {info.kind} takes other than {info.end - info.start:,} bytes")
    return info


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)


def _check_offsets(tensors: dict[str, TensorInfo], size: int) -> None:
    """Tensors follow each other without gap or overlap, from the first byte to the last."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlap" if info.start < end else "leave a gap"
            raise ValueError(f"the bytes of {name[:80]} {what}: they begin at {info.start:,}, not at {end:,}")
        end = info.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,} and its data at {size:,}")
