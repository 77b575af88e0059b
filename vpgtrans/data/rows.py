"""Records by number, whatever file they lie in: JSON lines, and JSON arrays of any size.

Everything that is drawn at random is drawn by row number, so a container must know how many rows it has and read any
of them. Files are mapped, not loaded: what is kept in memory is where each row begins.
"""

import hashlib
import json
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vpgtrans.errors import DataError

_WHOLE_FILE_LIMIT = 1 << 30
"""Files up to this size count with their content in a fingerprint; larger ones with size and modification time."""
_STRETCH = 1 << 24
"""Bytes that are scanned at once."""


class Rows(ABC):
    """The records of one data set."""

    def __init__(self, name: str, files: Sequence[Path] = ()):
        """name: in messages. files: what the fingerprint covers."""
        self.name = name
        self.files = list(files)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, row: int) -> dict[str, Any]:
        """A record. DataError, naming file and row, if it is malformed."""

    @property
    def columns(self) -> list[str] | None:
        """What every record has; None where each has keys of its own."""
        return None

    @property
    def stretches(self) -> np.ndarray | None:
        """First rows of the stretches that are cheap to read together, int64 [n], 0 first; None: any order is cheap."""
        return None

    @property
    def window(self) -> int:
        """How many stretches may be read side by side; 0: one after the other, in their own order."""
        return 1

    def where(self, row: int) -> str:
        """A row as its owner would look for it."""
        return f"{self.name}, row {row}"

    @cached_property
    def fingerprint(self) -> str:
        """Of what the files hold."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file_state(file, whole=True))
        return digest.hexdigest()


class ListRows(Rows):
    """Records that are in memory, or come from a list-like of them."""

    def __init__(self, records: Sequence[dict[str, Any]], name: str, files: Sequence[Path] = ()):
        super().__init__(name, files)
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def read(self, row: int) -> dict[str, Any]:
        return self.records[row]


class _Mapped(Rows):
    """Records of a text file, each between two known offsets."""

    def __init__(self, file: Path):
        super().__init__(str(file), [file])
        self.file = file
        if not file.stat().st_size:
            raise DataError(f"{file}: the file is empty")
        self._open()

    def _open(self) -> None:
        with self.file.open("rb") as stream:
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _parse(self, row: int, start: int, stop: int) -> dict[str, Any]:
        try:
            value = json.loads(self._bytes[start:stop])
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where(row)}: no valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise DataError(f"{self.where(row)}: {type(value).__name__}; right would be an object {{…}}")
        return value


class LineRows(_Mapped):
    """JSON lines. Blank lines are no rows."""

    def __init__(self, file: Path):
        super().__init__(file)
        size, ends = len(self._bytes), []
        for start in range(0, size, _STRETCH):
            piece = np.frombuffer(self._bytes[start : start + _STRETCH], dtype=np.uint8)
            ends.append(np.flatnonzero(piece == ord("\n")) + start)
        stops = np.concatenate(ends)
        if not len(stops) or stops[-1] != size - 1:
            stops = np.append(stops, size)
        starts = np.append(0, stops[:-1] + 1)
        lengths = stops - starts
        # "\n" or "\r\n" alone is no row
        bare = [line for line in np.flatnonzero(lengths == 1).tolist() if self._bytes[int(starts[line])] == ord("\r")]
        lengths[bare] = 0
        self._lines = np.flatnonzero(lengths)
        self._starts, self._stops = starts[self._lines], stops[self._lines]

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, row: int) -> dict[str, Any]:
        return self._parse(row, int(self._starts[row]), int(self._stops[row]))

    def where(self, row: int) -> str:
        return f"{self.file}, line {int(self._lines[row]) + 1}"


class ArrayRows(_Mapped):
    """The objects of a JSON array, which is scanned once and never held as a whole."""

    def __init__(self, file: Path):
        super().__init__(file)
        spans = np.array(list(self._scan()), dtype=np.int64).reshape(-1, 2)
        self._starts, self._stops = spans[:, 0], spans[:, 1]

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, row: int) -> dict[str, Any]:
        return self._parse(row, int(self._starts[row]), int(self._stops[row]))

    def where(self, row: int) -> str:
        line = self._bytes[: int(self._starts[row])].count(b"\n") + 1
        return f"{self.file}, element {row} (line {line})"

    def _scan(self) -> Iterator[tuple[int, int]]:
        """Start and end of each element."""
        depth, start, closed = 0, -1, False
        inside = False  # a string
        position = -1
        for position, character in self._structure():
            if character == _QUOTE:
                inside = not inside
            elif inside:
                continue
            elif character in b"{[":
                depth += 1
                if depth == 2:
                    start = position
            elif character in b"}]":
                depth -= 1
                if depth == 1:
                    yield start, position + 1
                if depth == 0:
                    closed = True
                    break
            if depth < 1:
                break
        if not closed:
            line = self._bytes[: max(0, position)].count(b"\n") + 1
            raise DataError(
                f"{self.file}: line {line}: no JSON array of objects that ends where the file does; "
                "right would be [{…}, {…}]"
            )

    def _structure(self) -> Iterator[tuple[int, int]]:
        """Positions of brackets and of quotes that are not escaped."""
        size = len(self._bytes)
        wanted = np.zeros(256, dtype=bool)
        wanted[list(b'"{}[]')] = True
        for start in range(0, size, _STRETCH):
            piece = np.frombuffer(self._bytes[start : start + _STRETCH], dtype=np.uint8)
            for place in np.flatnonzero(wanted[piece]).tolist():
                character = int(piece[place])
                if character != _QUOTE or not self._escaped(start + place):
                    yield start + place, character

    def _escaped(self, position: int) -> bool:
        """Whether an odd number of backslashes stands before it."""
        slashes = position
        while slashes and self._bytes[slashes - 1] == _BACKSLASH:
            slashes -= 1
        return (position - slashes) % 2 == 1


_QUOTE, _BACKSLASH = ord('"'), ord("\\")


def file_state(file: Path, *, whole: bool) -> bytes:
    """What tells a changed file: its content's hash or, for large ones and where `whole` is false, size and time."""
    try:
        status = file.stat()
    except OSError:
        return b"missing"
    if whole and status.st_size <= _WHOLE_FILE_LIMIT:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    return f"{status.st_size} {status.st_mtime_ns}".encode()
