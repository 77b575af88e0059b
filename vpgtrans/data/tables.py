"""Tables: parquet read in place, row group by row group; CSV and TSV, and what `datasets` holds, as mapped Arrow."""

import contextlib
import csv
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpgtrans.data.rows import Rows
from vpgtrans.errors import DataError

GROUP_LIMIT = 256 << 20
"""Bytes of the largest row group that is read in place. A file with larger ones is copied into mapped Arrow once."""
_CELL_LIMIT = (1 << 31) - 1
"""Characters of a cell, which may hold an image as base64; `csv` itself takes 131,072."""
WINDOW_BYTES = 64 << 20
"""Row groups that are read side by side, and so shuffled together, have about this size."""


class ArrowRows(Rows):
    """A `datasets.Dataset`: Arrow files, mapped."""

    def __init__(self, table: Any, name: str, files: Sequence[Path] = ()):
        super().__init__(name, files)
        self._table = undecoded(table)

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def columns(self) -> list[str]:
        return list(self._table.column_names)

    def read(self, row: int) -> dict[str, Any]:
        return self._table[row]

    def may_name_files(self, column: str) -> bool:
        if column not in self.columns:
            return False
        found = self._table.data.column(column)
        if not _beside_bytes(found.type):
            return _may_hold_paths(found.type)
        for chunk in found.chunks:
            while _is_list(chunk.type):
                chunk = chunk.flatten()
            if chunk.field("bytes").null_count < len(chunk):
                return False
        return True

    def values(self, column: str) -> Iterator[Any]:
        if column not in self.columns:
            return iter([None] * len(self))
        chosen = self._table.select_columns([column])
        return (value for rows in chosen.iter(1000) for value in rows[column])


class ParquetRows(Rows):
    """Parquet files, local or by fsspec; of each the row groups that are being read are kept in memory."""

    def __init__(self, files: Sequence[Path], name: str):
        """
        Raises:
            DataError: a file is no parquet, or has other columns than the first one.
        """
        import pyarrow.parquet as pq

        super().__init__(name, files)
        starts, self._places, sizes = [0], [], []
        self._columns: list[str] | None = None
        self._firsts: list[int] = []  # first row of each file
        for number, file in enumerate(files):
            with _reading(file):
                metadata = pq.read_metadata(file)
                columns = metadata.schema.to_arrow_schema().names
                groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
                if min((group.num_rows for group in groups), default=0) < 0 or metadata.num_rows != sum(
                    group.num_rows for group in groups
                ):
                    raise ValueError("it states two numbers of rows")
            if self._columns is not None and columns != self._columns:
                raise DataError(f"{file}: columns {', '.join(columns)}; {files[0]} has {', '.join(self._columns)}")
            self._columns = columns
            self._firsts.append(starts[-1])
            for group, about in enumerate(groups):
                if about.num_rows:
                    starts.append(starts[-1] + about.num_rows)
                    sizes.append(about.total_byte_size)
                    self._places.append((number, group))
        self._starts = np.array(starts)
        self.largest = max(sizes, default=0)
        """Bytes of the largest row group."""
        self._window = max(1, WINDOW_BYTES * len(sizes) // max(1, sum(sizes)))
        self._open: dict[int, Any] = {}
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}, "_groups": OrderedDict()}

    def reopen(self) -> None:
        self._open = {}
        self._groups = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def columns(self) -> list[str]:
        return self._columns or []

    @property
    def stretches(self) -> np.ndarray:
        return self._starts[:-1]

    @property
    def window(self) -> int:
        return self._window

    def where(self, row: int) -> str:
        number, _ = self._places[self._group(row)]
        return f"{self.files[number]}, row {row - self._firsts[number]}"

    def read(self, row: int) -> dict[str, Any]:
        place = self._group(row)
        table = self._table(place)
        try:
            return table.slice(row - int(self._starts[place]), 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:  # a text that is no UTF-8, a date that is none
            raise DataError(f"{self.where(row)}: not readable ({error})") from error

    def may_name_files(self, column: str) -> bool:
        import pyarrow.parquet as pq

        if column not in self.columns:
            return False
        for file in self.files:
            with _reading(file):
                metadata = pq.read_metadata(file)
                kind = metadata.schema.to_arrow_schema().field(column).type
                if not _beside_bytes(kind):
                    return _may_hold_paths(kind)
                leaves = [metadata.schema.column(number).path.split(".") for number in range(metadata.num_columns)]
                place = next(n for n, leaf in enumerate(leaves) if leaf[0] == column and leaf[-1] == "bytes")
                for group in range(metadata.num_row_groups):
                    about = metadata.row_group(group).column(place)
                    known = about.statistics is not None and about.statistics.has_null_count
                    if not known or about.statistics.null_count < about.num_values:
                        return False
        return True

    def values(self, column: str) -> Iterator[Any]:
        import pyarrow.parquet as pq

        if column not in self.columns:
            yield from [None] * len(self)
            return
        for file in self.files:
            with _reading(file), pq.ParquetFile(file) as opened:
                for batch in opened.iter_batches(columns=[column]):
                    yield from _values(batch.column(0))

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _table(self, place: int) -> Any:
        import pyarrow.parquet as pq

        if place in self._groups:
            self._groups.move_to_end(place)
            return self._groups[place]
        number, group = self._places[place]
        with _reading(self.files[number]):
            if number not in self._open:
                if len(self._open) > 64:
                    self._open.clear()
                # Not mapped: pages that were read would count as memory, and grow to the size of the file.
                self._open[number] = pq.ParquetFile(self.files[number], page_checksum_verification=True)
            table = self._open[number].read_row_group(group, use_threads=False)
            if table.num_rows != self._starts[place + 1] - self._starts[place]:
                raise ValueError(f"row group {group} has {table.num_rows} rows, not as many as it states")
        # One more than the window: the order goes on to the next window before the last one is done with.
        while len(self._groups) > self._window:
            self._groups.popitem(last=False)
        self._groups[place] = table
        return table


def open_parquet(files: Sequence[Path], name: str) -> Rows:
    """Parquet in place or, where its row groups are too large for that, through mapped Arrow."""
    for file in files:
        if not file.stat().st_size:
            raise DataError(f"{file}: the file is empty")
    rows = ParquetRows(files, name)
    return rows if rows.largest <= GROUP_LIMIT else open_table("parquet", files, name)


def open_delimited(file: Path, delimiter: str) -> ArrowRows:
    """CSV or TSV with a header, cells as they are written: "007" and "NA" are texts.

    Raises:
        DataError: unreadable, empty, or with more cells in a row than in the header.
    """
    from datasets import Features, Value

    limit = csv.field_size_limit(_CELL_LIMIT)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = filter(None, csv.reader(stream, delimiter=delimiter))  # blank lines are no rows
            head, first = next(lines, []), next(lines, [])
    except (csv.Error, ValueError) as error:
        raise DataError(f"{file}: not readable as csv: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not first:
        raise DataError(f"{file}: no samples (it has no rows)")
    if twice := next((name for name in head if head.count(name) > 1), None):
        raise DataError(f"{file}: two columns {twice!r} in the header; right would be names that differ")
    if len(first) > len(head):  # of later rows the reader itself says so; of the first it takes a cell for its name
        raise DataError(f"{file}: not readable as csv: {len(first)} cells in the first row, {len(head)} in the header")
    features = Features({name: Value("string") for name in head})
    return open_table("csv", [file], str(file), delimiter=delimiter, features=features, keep_default_na=False)


def open_table(kind: str, files: Sequence[Path], name: str, **options: Any) -> ArrowRows:
    """Files that `datasets` reads (csv, parquet), kept as mapped Arrow in the user's cache.

    Raises:
        DataError: unreadable or empty.
    """
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    from vpgtrans.references import cache_dir

    for file in files:
        if not file.stat().st_size:
            raise DataError(f"{file}: the file is empty")
    try:
        with quiet_datasets():
            table = load_dataset(
                kind,
                data_files=[str(file) for file in files],
                split="train",
                cache_dir=str(cache_dir() / "datasets/tables"),
                **options,
            )
    except (DatasetGenerationError, pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{name}: not readable as {kind}: {error.__cause__ or error}") from error
    return ArrowRows(table, name, files)


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Progress bars of `datasets` only on a terminal, and none of its log: what it says of errors is in them, too."""
    import datasets

    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with _without_bars(datasets):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    if sys.stderr.isatty() or not datasets.is_progress_bar_enabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _values(column: Any) -> list[Any]:
    """Of an Arrow array; None where one is malformed, such as a text that is no UTF-8."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _element(kind: Any) -> Any:
    """Of a list in any depth the type that it is of."""
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _beside_bytes(kind: Any) -> bool:
    """Whether it is what `datasets` keeps of an image: a path matters only where there are no bytes."""
    import pyarrow as pa

    kind = _element(kind)
    return pa.types.is_struct(kind) and any(f.name == "bytes" and not pa.types.is_null(f.type) for f in kind)


def _may_hold_paths(kind: Any) -> bool:
    """Whether a column of this type, of images or of turns, can hold paths of images."""
    import pyarrow as pa

    kind = _element(kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        if _beside_bytes(kind):
            return False
        return any(
            _may_hold_paths(field.type)
            for field in kind
            # a turn's content holds images only where it is in parts
            if field.name in ("path", "image", "image_url", "url")
            or (field.name in ("content", "value") and _is_list(field.type))
        )
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: not readable as parquet: {error}") from error


def undecoded(table: Any) -> Any:
    """Image columns as stored bytes or paths: decoding happens in one place, `open_image`."""
    import datasets

    for column, feature in (table.features or {}).items():
        inner = feature
        while isinstance(inner, datasets.List | datasets.LargeList):
            inner = inner.feature
        if isinstance(inner, datasets.Image):
            plain: Any = datasets.Image(decode=False)
            if inner is not feature:
                plain = datasets.List(plain)
            table = table.cast_column(column, plain)
    return table
