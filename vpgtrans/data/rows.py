"""Records by number, whatever file they lie in: JSON lines, and JSON arrays of any size.

Everything that is drawn at random is drawn by row number, so a container must know how many rows it has and read any
of them. Files are mapped, not loaded: what is kept in memory is where each row begins.
"""

import hashlib
import json
import mmap
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np

from vpgtrans.errors import DataError
from vpgtrans.references import digest

_WHOLE_FILE_LIMIT = 1 << 30
"""Files up to this size count with their content in a fingerprint; larger ones with size and modification time."""
_STRETCH = 1 << 22
"""Bytes that are scanned at once."""
_BLOCKS, _BLOCK = 64, 1 << 16
"""Of a larger file as many blocks of so many bytes, first and last among them, tell a copy from another file."""


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

    def number(self, row: int) -> int:
        """Of a row in the data set as it lies there."""
        return row

    def values(self, column: str) -> Iterator[Any]:
        """One column of all rows; None where a record lacks it, or is malformed."""
        for row in range(len(self)):
            try:
                yield self.read(row).get(column)
            except DataError:
                yield None

    @property
    def columns(self) -> list[str] | None:
        """What every record has; None where each has keys of its own."""
        return None

    @property
    def optional(self) -> Collection[str]:
        """Keys that the format gives a record where it has anything for them, so that rows may lack them."""
        return ()

    def may_name_files(self, column: str) -> bool:
        """Whether a column of images can hold paths, as far as can be told without reading it."""
        return True

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

    def content(self, state: "State") -> str:
        """A hash of what the rows depend on, by what `state` tells of each file."""
        found = hashlib.sha256()
        for file in self.files:
            found.update(state(file, whole=True))
        return found.hexdigest()

    def reopen(self) -> None:  # noqa: B027  # most have nothing to let go of
        """In a process that was forked: let go of open files, connections and buffers, which two must not share."""

    @cached_property
    def fingerprint(self) -> str:
        """Of what the files hold."""
        return self.content(file_state)


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
        filled = stops > starts
        # Of the others only those that begin with white space can hold nothing else.
        first = np.frombuffer(self._bytes, dtype=np.uint8)[starts.clip(max=size - 1)]
        for line in np.flatnonzero(filled & np.isin(first, list(b" \t\r"))).tolist():
            filled[line] = bool(self._bytes[int(starts[line]) : int(stops[line])].strip())
        self._lines = np.flatnonzero(filled)
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
        self._starts, self._stops, end, self._lines = self._scan()
        self._check_between(end)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, row: int) -> dict[str, Any]:
        return self._parse(row, int(self._starts[row]), int(self._stops[row]))

    def where(self, row: int) -> str:
        return f"{self.file}, element {row} (line {self._line(int(self._starts[row]))})"

    def _line(self, position: int) -> int:
        stretch = min(position // _STRETCH, len(self._lines) - 1)
        return self._lines[stretch] + self._bytes[stretch * _STRETCH : position].count(b"\n") + 1

    def _scan(self) -> tuple[np.ndarray, np.ndarray, int, list[int]]:
        """Start and end of each element, where the array is closed (-1: nowhere), and line ends before each stretch.

        A bracket stands in a string if an odd number of quotes comes before it; the others, added up, are the depth.
        """
        starts, stops, lines = [], [], [0]
        inside = depth = 0
        escape = False
        end = -1
        for start in range(0, len(self._bytes), _STRETCH):
            piece = np.frombuffer(self._bytes[start : start + _STRETCH], dtype=np.uint8)
            lines.append(lines[-1] + int(np.count_nonzero(piece == ord("\n"))))
            escaped = _escaped(piece, escape)
            escape = bool(len(escaped)) and int(escaped[-1]) == len(piece)
            is_quote = piece == ord('"')
            is_quote[escaped[: len(escaped) - escape]] = False
            quotes = np.flatnonzero(is_quote)
            brackets = np.flatnonzero(_STEPS[piece])
            brackets = brackets[(np.searchsorted(quotes, brackets) + inside) % 2 == 0]
            inside += len(quotes)
            steps = _STEPS[piece[brackets]]
            depths = depth + np.cumsum(steps, dtype=np.int64)
            closed = np.flatnonzero(depths < 1)[:1]
            if len(closed):
                end = start + int(brackets[closed[0]])
                brackets, steps, depths = (part[: closed[0]] for part in (brackets, steps, depths))
            starts.append(start + brackets[(depths == 2) & (steps > 0)])
            stops.append(start + brackets[(depths == 1) & (steps < 0)] + 1)
            if end >= 0:
                break
            depth = int(depths[-1]) if len(depths) else depth
        return np.concatenate(starts), np.concatenate(stops), end, lines

    def _check_between(self, end: int) -> None:
        """Raises DataError unless there is a comma between two elements, and nothing around the array."""
        last = len(self._stops)
        # An element that never ends has a start alone.
        starts = [*self._starts.tolist(), end][: last + 1]
        places = zip([0, *self._stops.tolist()], starts, strict=True)
        for number, (start, stop) in enumerate(places):
            right = _OPENING if number == 0 else _BETWEEN
            if number == last and end >= 0:
                stop, right = len(self._bytes), _ALL if number == 0 else _CLOSING
            if not right.fullmatch(self._bytes, start, max(start, stop)):
                self._refuse(number, start)
        if end < 0:
            self._refuse(last, int(self._starts[last]) if len(self._starts) > last else len(self._bytes))

    def _refuse(self, elements: int, position: int) -> NoReturn:
        """The array goes wrong behind so many elements or, where a quote or bracket is amiss, in one of them."""
        for row in range(elements):
            self.read(row)
        raise DataError(
            f"{self.file}: line {self._line(position)}: no JSON array of objects that ends where the file does "
            f"(it goes wrong behind {elements} elements); right would be [{{…}}, {{…}}]"
        )


_STEPS = np.zeros(256, dtype=np.int8)
"""What a byte adds to the depth."""
_STEPS[list(b"{[")], _STEPS[list(b"}]")] = 1, -1
_OPENING = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*\[[ \t\r\n]*")
_BETWEEN = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
_CLOSING = re.compile(rb"[ \t\r\n]*\][ \t\r\n]*")
_ALL = re.compile(_OPENING.pattern + _CLOSING.pattern)


def _escaped(piece: np.ndarray, escape: bool) -> np.ndarray:
    """Places that an odd number of backslashes stands before, int64 [n]; the last may be the one behind the piece.

    escape: the place 0 is one, by what came before the piece.
    """
    slashes = np.flatnonzero(piece == ord("\\"))
    if escape:
        slashes = np.append(-1, slashes)
    if not len(slashes):
        return slashes
    firsts = np.flatnonzero(np.diff(slashes, prepend=-3) != 1)
    lasts = np.append(firsts[1:], len(slashes)) - 1
    return slashes[lasts[(lasts - firsts) % 2 == 0]] + 1


class State(Protocol):
    """What tells a changed file from itself as it was."""

    def __call__(self, file: str | Path, *, whole: bool) -> bytes:
        """whole: its content counts, as far as that can be read in a moment."""


def file_state(file: str | Path, *, whole: bool) -> bytes:
    """The content's hash or, for large files and where `whole` is false, size and time."""
    status = _status(file)
    if status is None:
        return b"missing"
    if whole and status.st_size <= _WHOLE_FILE_LIMIT:
        return digest(Path(file))
    return f"{status.st_size} {status.st_mtime_ns}".encode()


def lasting_state(file: str | Path, *, whole: bool) -> bytes:
    """As `file_state`, but a copy with another time is the same: of large files their size and some blocks count."""
    status = _status(file)
    if status is None:
        return b"missing"
    size = str(status.st_size).encode()
    if not whole:
        return size
    if status.st_size <= _WHOLE_FILE_LIMIT:
        return digest(Path(file))
    blocks = hashlib.sha256(size)
    with open(file, "rb") as stream:
        for number in range(_BLOCKS):
            stream.seek((status.st_size - _BLOCK) * number // (_BLOCKS - 1))
            blocks.update(stream.read(_BLOCK))
    return blocks.digest()


def _status(file: str | Path) -> os.stat_result | None:
    try:
        return os.stat(file)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return None
