"""Which samples an update of a stage holds: padded rows or packs, on however many devices."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import product

import numpy as np

from vpgtrans.data.config import PackingConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.packs import Lengths, PackOrder, in_a_batch, plan_packs
from vpgtrans.errors import RecipeError
from vpgtrans.training.config import Stage
from vpgtrans.training.devices import check_batch

_STRETCH = 1 << 16
"""Draws that are looked at together."""
_APART = 15_485_863
"""Between the seeds of two stages' packs."""
_TYPICAL = 1000
"""Samples by which the length of others' answers is estimated."""
_PLACES = 1 << 20
"""More samples than a pack has."""


@dataclass(frozen=True)
class Drawn:
    """Samples of an update: rows of the mixture, their places in the run's order (None: none), and of each its pack."""

    rows: np.ndarray
    positions: np.ndarray | None = None
    packs: np.ndarray | None = None


class Draws(ABC):
    """Which samples an update of a stage holds, on how many devices whatsoever.

    Attributes:
        mixture: where samples are drawn from. per_update: samples of an update, on average.
    """

    mixture: Mixture
    per_update: float

    @abstractmethod
    def updates(self, samples: int) -> int:
        """How many updates a budget of so many samples is."""

    @abstractmethod
    def typical(self) -> np.ndarray:
        """At most `_TYPICAL` samples that may come up, the same ones for every seed."""

    @abstractmethod
    def update(self, number: int, *, rank: int = 0, world: int = 1) -> Drawn:
        """A device's share of an update; by default all of it."""

    @abstractmethod
    def check(self, world: int) -> None:
        """Raises RecipeError where an update can't be shared among so many devices."""

    def visited(self, updates: int) -> np.ndarray:
        """The distinct samples of the first updates, int64 [n]."""
        return np.unique(np.concatenate([self.update(number).rows for number in range(updates)]))


class SampleDraws(Draws):
    """A row a sample: as many samples in every update, one after another in the mixture's order."""

    def __init__(self, mixture: Mixture, *, seed: int, stage: Stage, first_sample: int = 0):
        """first_sample: the run's sample number at which the stage begins."""
        self.mixture = mixture
        self.seed = seed
        self.stage = stage
        self.batch_size = stage.batch_size
        self.first_sample = first_sample
        self.per_update = float(stage.batch_size)

    def updates(self, samples: int) -> int:
        return -(-samples // self.batch_size)

    def typical(self) -> np.ndarray:
        return self.mixture.draws(0, 0, min(_TYPICAL, len(self.mixture)))

    def update(self, number: int, *, rank: int = 0, world: int = 1) -> Drawn:
        first = self.first_sample + number * self.batch_size
        last = first + self.batch_size
        own = slice(rank, None, world)
        return Drawn(self.mixture.draws(self.seed, first, last)[own], np.arange(first, last)[own])

    def check(self, world: int) -> None:
        check_batch(self.stage.name, self.batch_size, world)

    def visited(self, updates: int) -> np.ndarray:
        met = np.zeros(len(self.mixture), dtype=bool)
        last = self.first_sample + updates * self.batch_size
        for start in range(self.first_sample, last, _STRETCH):
            met[self.mixture.draws(self.seed, start, min(last, start + _STRETCH))] = True
            if met.all():
                break
        return np.flatnonzero(met)


class PackDraws(Draws):
    """A row a pack: as many packs in every update, so that it holds about `batch_size` samples.

    How many follows from the batch size and the first epoch's packs alone. All devices get the same number of them.
    """

    def __init__(self, order: PackOrder, *, stage: Stage):
        self.order = order
        self.mixture = order.mixture
        self.stage = stage
        self.packs = _nearest(stage.batch_size, order.samples_per_pack)
        self.per_update = self.packs * order.samples_per_pack

    def updates(self, samples: int) -> int:
        """The nearest number: packs that hold a little less than the batch size are no reason for one more update."""
        return _nearest(samples, self.per_update)

    def typical(self) -> np.ndarray:
        drawn = self.mixture.draws(0, 0, len(self.mixture))
        return drawn[self.order.lengths.fit(self.order.limits)[drawn]][:_TYPICAL]

    def update(self, number: int, *, rank: int = 0, world: int = 1) -> Drawn:
        numbers = range(number * self.packs, (number + 1) * self.packs)
        packs = self.order.packs(numbers.start, numbers.stop)[rank::world]
        sizes = [len(pack) for pack in packs]
        positions = [pack * _PLACES + np.arange(size) for pack, size in zip(numbers[rank::world], sizes, strict=True)]
        return Drawn(np.concatenate(packs), np.concatenate(positions), np.repeat(np.arange(len(packs)), sizes))

    def check(self, world: int) -> None:
        if not self.packs % world:
            return
        limits = self.order.limits
        raise RecipeError(
            f"stage {self.stage.name}: an update of about {self.stage.batch_size} samples is {self.packs} pack(s), "
            f"each of at most {limits.max_tokens:,} tokens and {limits.max_samples} samples, which {world} devices "
            f"can't share evenly; right would be {self._evenly(world)}"
        )

    def _evenly(self, world: int) -> str:
        """What a recipe is to say instead; tried out, because packs may be full by tokens, images or samples."""
        size, most = self.stage.batch_size, self.order.limits.max_samples or self.stage.batch_size
        larger = range(size // world * world + world, 2 * size + world, world)
        for batch_size, packs in product((size, *larger), (world, 2 * world, 3 * world)):
            samples = batch_size // packs
            if 0 < samples <= most and not self._packs(batch_size, samples) % world:
                also = f"batch_size: {batch_size} with " if batch_size > size else ""
                return f"{also}data.packing.max_samples: {samples}"
        return "another batch_size or other limits of packs"

    def _packs(self, batch_size: int, max_samples: int) -> int:
        """Packs of an update, if it were of so many samples, and a pack too."""
        limits = self.order.limits.model_copy(update={"max_samples": max_samples})
        return _nearest(batch_size, self.order.within(limits).samples_per_pack)


def _nearest(whole: int, part: float) -> int:
    """How many parts are about a whole, at least one."""
    return max(1, round(whole / part))


def pack_draws(
    mixture: Mixture, lengths: Lengths, limits: PackingConfig, stage: Stage, *, seed: int, index: int
) -> PackDraws:
    """The packs of a run's stage number `index`. Every stage begins an epoch of its own.

    Raises:
        DataError: no sample fits a pack. IntegrityError: a plan that was kept is damaged.
    """
    own = in_a_batch(limits, stage.batch_size)
    plan, _ = plan_packs(lengths, own)
    return PackDraws(PackOrder(mixture, lengths, plan, own, seed=seed + _APART * index), stage=stage)
