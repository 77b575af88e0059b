"""Rows that a filter keeps: a data set seen through a sidecar of it, a parquet file with a column `keep`.

A sidecar that `vpgtrans data filter` wrote goes by row number and says which data set it was made for. Any other one
goes by `id` where it has such a column, else by `row`.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from itertools import compress, islice
from pathlib import Path
from typing import Any

import numpy as np

from vpgtrans.data.rows import Rows, State
from vpgtrans.errors import DataError

KEY = b"vpgtrans"
"""Under which a sidecar's file metadata says what it was made for."""


class KeptRows(Rows):
    """Some of a data set's rows, in their order."""

    def __init__(self, rows: Rows, kept: np.ndarray):
        """kept: bool [len(rows)]."""
        super().__init__(rows.name, rows.files)
        self._rows = rows
        self._kept = np.flatnonzero(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, row: int) -> dict[str, Any]:
        return self._rows.read(self.number(row))

    def number(self, row: int) -> int:
        return int(self._kept[row])

    def where(self, row: int) -> str:
        return self._rows.where(self.number(row))

    def values(self, column: str) -> Iterator[Any]:
        kept = np.zeros(len(self._rows), dtype=bool)
        kept[self._kept] = True
        return compress(self._rows.values(column), kept)

    def reopen(self) -> None:
        self._rows.reopen()

    @property
    def columns(self) -> list[str] | None:
        return self._rows.columns

    @property
    def optional(self) -> Collection[str]:
        return self._rows.optional

    def may_name_files(self, column: str) -> bool:
        return self._rows.may_name_files(column)

    @property
    def stretches(self) -> np.ndarray | None:
        starts = self._rows.stretches
        if starts is None:
            return None
        # Stretches of which nothing is kept fall on the next one's first row.
        places = np.unique(np.searchsorted(self._kept, starts))
        return places[places < len(self)]

    @property
    def window(self) -> int:
        return self._rows.window

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._rows.fingerprint.encode() + self._kept.tobytes()).hexdigest()

    def content(self, state: State) -> str:
        return hashlib.sha256(self._rows.content(state).encode() + self._kept.tobytes()).hexdigest()


def kept_rows(rows: Rows, file: Path, *, id_column: str) -> KeptRows:
    """Those of the rows that the sidecar `file` keeps. What it doesn't mention is not kept.

    Raises:
        DataError: it is none, keeps nothing, or belongs to another data set.
    """
    table = _open(file)
    names = table.schema_arrow.names
    made_for = read_made_for(table)
    if made_for is not None and made_for != [len(rows), rows.fingerprint]:
        raise DataError(
            f"{file}: made for another data set than {rows.name}, or for it as it was before "
            f"({made_for[0]} rows, here are {len(rows)}); score this one with `vpgtrans data filter`"
        )
    if "row" in names and (made_for is not None or "id" not in names):
        kept = _by_row(table, len(rows), file)
    elif "id" in names:
        kept = _by_id(table, rows, id_column, file)
    else:
        raise DataError(f"{file}: no column `row` or `id` besides `keep`; the columns are {', '.join(names)}")
    if not kept.any():
        raise DataError(f"{file}: keeps none of the {len(rows)} rows of {rows.name}")
    return KeptRows(rows, kept)


def read_made_for(table: Any) -> list[Any] | None:
    """Rows and fingerprint of the data set that a parquet file says it was made for; None where it says nothing."""
    said = json.loads((table.schema_arrow.metadata or {}).get(KEY, b"null"))
    return None if said is None else [said["rows"], said["fingerprint"]]


def _open(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.is_file():
        raise DataError(f"{file}: no such file; `filter` names a parquet file with a boolean column `keep`")
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable as parquet: {error}") from error
    schema = table.schema_arrow
    if "keep" not in schema.names or schema.field("keep").type != pa.bool_():
        raise DataError(f"{file}: no boolean column `keep`; the columns are {', '.join(schema.names)}")
    return table


def _pieces(table: Any, column: str, file: Path) -> Iterator[tuple[list[Any], np.ndarray]]:
    """A column beside `keep`, stretch by stretch; null is not kept."""
    import pyarrow as pa

    try:
        for batch in table.iter_batches(columns=[column, "keep"]):
            keep = batch.column("keep").fill_null(False).to_numpy(zero_copy_only=False)
            yield batch.column(column).to_pylist(), keep
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable as parquet: {error}") from error


def _by_row(table: Any, count: int, file: Path) -> np.ndarray:
    kept = np.zeros(count, dtype=bool)
    for numbers, keep in _pieces(table, "row", file):
        wrong = next((row for row in numbers if not isinstance(row, int) or not 0 <= row < count), None)
        if wrong is not None:
            raise DataError(f"{file}: row {wrong} of a data set of {count} rows; the file belongs to another one")
        kept[np.array(numbers, dtype=np.int64)] = keep
    return kept


def _by_id(table: Any, rows: Rows, id_column: str, file: Path) -> np.ndarray:
    # Hashes, not the ids themselves: 8 bytes a row.
    pieces = []
    for ids, keep in _pieces(table, "id", file):
        hashes, there = hashed(ids, len(ids))
        pieces.append(hashes[keep & there])
    wanted = np.unique(np.concatenate(pieces)) if pieces else np.empty(0, dtype=np.uint64)
    own, there = hashed(rows.values(id_column), len(rows))
    kept = np.isin(own, wanted) & there
    if len(wanted) and not kept.any():
        raise DataError(f"{file}: none of the ids that it keeps is in {rows.name} (column {id_column!r})")
    return kept


def hashed(ids: Iterable[Any], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of so many ids, uint64 [count], and which of them are one, bool [count]: null is like no other id."""
    there = np.zeros(count, dtype=bool)
    hashes = np.zeros(count, dtype=np.uint64)
    for place, value in enumerate(islice(ids, count)):
        if value is not None:
            there[place], hashes[place] = True, hash64(value)
    return hashes, there


def hash64(value: Any) -> int:
    """64 bits of a value's text."""
    return int.from_bytes(
        hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"
    )
