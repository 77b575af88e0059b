"""Rows of a data set that is read over the network as the run goes on, never as a whole."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np

from vpgtrans.data.rows import Rows, State
from vpgtrans.data.tables import undecoded
from vpgtrans.errors import DataError

_TOGETHER = 100
"""Rows that `datasets` hands over at once."""
STRETCH = 1000
"""Rows that are fetched, and shuffled, together."""


class StreamRows(Rows):
    """A `datasets.IterableDataset` of known length, read forwards; stretches come in their own order.

    Every process that loads reads all of it: on a slow line few of them are better.
    """

    def __init__(self, table: Any, count: int, name: str, *, state: str):
        """state: what identifies the data, for the fingerprint."""
        super().__init__(name)
        self._table = undecoded(table)
        self._count = count
        self._state = state
        self._iterator: Any = None
        self._next = 0
        self._stretches: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()

    @classmethod
    def of_hub(cls, repository: str, split: str, revision: str | None, name: str) -> "StreamRows":
        """
        Raises:
            DataError: the set doesn't say how many rows it has.
        """
        from datasets import load_dataset

        table = load_dataset(repository, split=split, revision=revision, streaming=True)
        known = (table.info.splits or {}).get(split)
        if known is None or not known.num_examples:
            raise DataError(f"{name}: the data set does not state its number of rows; right would be streaming: false")
        return cls(table, known.num_examples, name, state=f"{repository} {revision} {split}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_iterator": None, "_next": 0, "_stretches": OrderedDict()}

    def reopen(self) -> None:
        self._iterator, self._next = None, 0
        self._stretches = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @property
    def stretches(self) -> np.ndarray:
        return np.arange(0, self._count, STRETCH)

    @property
    def window(self) -> int:
        return 0

    @property
    def columns(self) -> list[str] | None:
        return self._table.column_names

    def may_name_files(self, column: str) -> bool:
        return False  # a hub's rows name no file of this machine

    @property
    def fingerprint(self) -> str:
        return self._state

    def content(self, state: State) -> str:
        return self._state

    def read(self, row: int) -> dict[str, Any]:
        place, index = divmod(row, STRETCH)
        if place not in self._stretches:
            self._fetch(place)
        found = self._stretches[place]
        if index >= len(found):
            raise DataError(f"{self.where(row)}: the stream ended after {place * STRETCH + len(found)} rows")
        return found[index]

    def _fetch(self, place: int) -> None:
        start = place * STRETCH
        if self._iterator is None or self._next > start:
            self._iterator, self._next = _records(self._table.skip(start)), start
        found: list[dict[str, Any]] = []
        while self._next < min(start + STRETCH, self._count):
            try:
                record = next(self._iterator, None)
            except Exception as error:  # of the network, or of a format that is read over it
                self._iterator = None
                raise DataError(f"{self.where(self._next)} or soon after: {error or type(error).__name__}") from error
            if record is None:
                break
            if self._next >= start:
                found.append(record)
            self._next += 1
        self._stretches[place] = found
        while len(self._stretches) > 2:
            self._stretches.popitem(last=False)


def _records(table: Any) -> Iterator[dict[str, Any]]:
    """All of them, in every process: iterated row by row, `datasets` would hand each loading process a part alone."""
    for columns in table.iter(_TOGETHER):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
