"""Several sources drawn together: sample number k of a run is a pure function of (seed, k).

So it does not depend on how many processes or loaders there are, and a run that goes on at sample k needs to know
nothing but k.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache, partial

import numpy as np
from PIL import Image

from vpgtrans.data.config import DataSource
from vpgtrans.data.epochs import over_epochs
from vpgtrans.data.sample import Sample
from vpgtrans.data.sources import Source, open_dataset
from vpgtrans.errors import DataError
from vpgtrans.prompts import Encoded, Prompter, answer_of

_GOLDEN = (5**0.5 - 1) / 2
"""Its multiples lie evenly in [0, 1), so that rounding favours no source for long."""


class Mixture:
    """Samples of weighted sources in a reproducible order. A sample is named by its index into their concatenation.

    An epoch is as many draws as there are samples. Each source gets its weight's share of them, to one draw, and goes
    through its own samples in an order of its own, epoch after epoch of them. A source with row weights draws sample i
    floor(c) or ceil(c) times in its epoch, where c is its expected count; the others draw each sample once.

    A source whose rows are cheap to read only in stretches (parquet, a stream) shuffles stretches, and rows within a
    window of some of them.
    """

    def __init__(self, sources: Sequence[tuple[Source, float]]):
        """
        Raises:
            DataError: there is no source, or a weight is not above zero.
        """
        if not sources:
            raise DataError("a mixture needs at least one source")
        if wrong := next((source.name for source, weight in sources if not 0 < weight < np.inf), None):
            raise DataError(f"{wrong}: the weight of a source must be above zero, and finite")
        self.sources = [source for source, _ in sources]
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        weights = np.array([weight for _, weight in sources], dtype=np.float64)
        self.shares = weights / weights.sum()
        """Of each source in the draws."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, sample: int) -> tuple[Source, int]:
        """The source of a sample, and its row there."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        source = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return self.sources[source], int(sample - self._starts[source])

    def sample(self, sample: int) -> Sample:
        source, row = self.locate(sample)
        return source.sample(row)

    def id(self, sample: int) -> str:
        source, row = self.locate(sample)
        return source.id(row)

    def caption(self, sample: int) -> str:
        source, row = self.locate(sample)
        return source.caption(row)

    def image(self, sample: int) -> Image.Image:
        source, row = self.locate(sample)
        return source.image(row)

    def encode(self, sample: int, prompter: Prompter) -> Encoded:
        """A sample as token ids; DataError as `Source.encode`."""
        source, row = self.locate(sample)
        return source.encode(source.sample(row), prompter)

    def readable(self, rows: Iterable[int]) -> Iterator[Sample]:
        """Those of the given samples that are well-formed.

        Raises:
            DataError: none is.
        """
        problem: DataError | None = None
        found = False
        for row in rows:
            try:
                sample = self.sample(int(row))
            except DataError as error:
                problem = error
                continue
            found = True
            yield sample
        if not found and problem is not None:
            raise problem

    def captions(self, count: int) -> Iterator[str]:
        """What is said in all samples or, where there are more than `count`, in as many; DataError as `readable`."""
        rows = range(len(self)) if len(self) <= count else self.draws(0, 0, count)
        return (answer_of(sample.text) for sample in self.readable(rows))

    def some(self, count: int, *, seed: int) -> list[int]:
        """A fixed choice of at most `count` different samples; where reading any row is dear, from few stretches."""
        if self.reach is None:
            return np.random.default_rng(seed).permutation(len(self))[:count].tolist()
        drawn = self.draws(seed, 0, min(len(self), 2 * count))
        return list(dict.fromkeys(drawn.tolist()))[:count]

    # --- order ----------------------------------------------------------------------------------

    @property
    def even(self) -> bool:
        """Whether every epoch draws each sample once, and rows may be read in any order."""
        return len(self.sources) == 1 and self.sources[0].weights is None and self.reach is None

    @property
    def reach(self) -> int | None:
        """How many draws that follow each other can be read in any order, where reading far ones is dear."""
        lengths = [
            len(source) // len(source.rows.stretches) * max(1, source.rows.window)
            for source in self.sources
            if source.rows.stretches is not None and len(source.rows.stretches) > max(1, source.rows.window)
        ]
        # Half of it: what is carried over is drawn together with what comes after.
        return max(1, min(lengths) // 2) if lengths else None

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of one epoch, int64 [len(self)]."""
        if len(self.sources) == 1:
            return _own_order(self.sources[0], np.random.Generator(np.random.PCG64([seed, epoch])))
        before, after = self._drawn(epoch), self._drawn(epoch + 1)
        places = np.repeat(np.arange(len(self.sources)), after - before)
        places = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(places)
        drawn = np.empty(len(self), dtype=np.int64)
        for number in range(len(self.sources)):
            rows = self._rows(number, seed, int(before[number]), int(after[number]))
            drawn[places == number] = rows + self._starts[number]
        return drawn

    def _drawn(self, epoch: int) -> np.ndarray:
        """How many draws each source has had before an epoch; they add up to the epochs' length."""
        # Where the sources' shares end in an epoch, moved by another fraction of a draw in each.
        moved = np.arange(epoch) * _GOLDEN % 1
        ends = np.floor(len(self) * np.append(0, np.cumsum(self.shares))[:, None] + moved).clip(max=len(self))
        ends[-1], ends[0] = len(self), 0
        return np.diff(ends, axis=0).sum(axis=1).astype(np.int64)

    def _rows(self, number: int, seed: int, start: int, stop: int) -> np.ndarray:
        """Draws start to stop of one source, counted over the whole run."""
        source = self.sources[number]

        def order(epoch: int) -> np.ndarray:
            return _own_order(source, np.random.Generator(np.random.PCG64([seed, epoch, number])))

        return over_epochs(order, len(source), start, stop)

    def draws(self, seed: int, start: int, stop: int) -> np.ndarray:
        """The run's samples number `start` to `stop`, int64 [stop - start]."""
        return over_epochs(partial(self._epoch, seed), len(self), start, stop)

    @cached_property
    def _epoch(self) -> Callable[[int, int], np.ndarray]:
        return lru_cache(maxsize=2)(self.order)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_epoch"}


def _own_order(source: Source, generator: np.random.Generator) -> np.ndarray:
    """The rows of one epoch of a source, int64 [len(source)]."""
    size = len(source)
    if source.rows.stretches is not None and source.weights is None:
        return _order_in_stretches(source.rows.stretches, size, source.rows.window, generator)
    order = generator.permutation(size)
    weights = source.weights
    if weights is None or np.allclose(weights, weights[0], rtol=1e-9, atol=0):
        return order
    share = (weights / weights.sum())[order]
    ends = np.cumsum(share)
    points = (np.arange(size) + generator.random()) / size * ends[-1]
    drawn = order[np.searchsorted(ends, points, side="right").clip(max=size - 1)]
    return generator.permutation(drawn)


def _order_in_stretches(starts: np.ndarray, size: int, window: int, generator: np.random.Generator) -> np.ndarray:
    """Stretches shuffled (unless `window` is 0), and rows shuffled within every `window` of them."""
    starts = starts[starts < size]
    stops = np.append(starts[1:], size)
    places = generator.permutation(len(starts)) if window else np.arange(len(starts))
    window = max(1, window)
    pieces = []
    for first in range(0, len(places), window):
        rows = [np.arange(starts[place], stops[place]) for place in places[first : first + window]]
        pieces.append(generator.permutation(np.concatenate(rows)))
    return np.concatenate(pieces)


def open_mixture(sources: Sequence[DataSource]) -> Mixture:
    """Data sources with their weights; DataError as `open_dataset`."""
    return Mixture([(open_dataset(source), source.weight) for source in sources])
