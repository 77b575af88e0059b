"""Samples on their way into the model: rows of a data set, with their images as far as the frozen front took them."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vpgtrans.data.sources import Mixture
from vpgtrans.errors import DataError, TrainingError
from vpgtrans.training.features import FeatureCache, FrozenFront, Unreadable


@dataclass
class Batch:
    """One optimizer update's samples (or a slice of them).

    Attributes:
        ids: sample ids. captions: their answers.
        inputs: [B, …] pixels, patches or visual tokens, by the level of the frozen front.
        skipped: ids of the samples that are left out because their image can't be read; B may be 0.
    """

    ids: list[str]
    captions: list[str]
    inputs: Tensor
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "Batch":
        return Batch(self.ids[start:stop], self.captions[start:stop], self.inputs[start:stop])

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids, self.captions, self.inputs.to(device), self.skipped)


@dataclass
class BadSamples:
    """Unreadable images so far: they are skipped, counted and listed, and too many of them stop the run."""

    limit: float
    seen: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, str] = field(default_factory=dict)
    """Those that a resumed run had listed before it stopped; they count again when they come up again."""

    @property
    def listed(self) -> dict[str, str]:
        """Sample id -> reason of all that were skipped."""
        return self.earlier | self.bad

    def note(self, ids: Sequence[str], unreadable: Sequence[Unreadable]) -> None:
        """Count a batch.

        Raises:
            TrainingError: more than `limit` of the samples so far are unreadable (and more than one is).
        """
        self.seen.update(ids)
        for entry in unreadable:
            if entry.id not in self.bad:
                logging.getLogger(__name__).warning("skipped %s: %s", entry.id, entry.reason)
                self.bad[entry.id] = entry.reason
        if len(self.bad) > max(1.0, self.limit * len(self.seen)):
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:5])
            raise TrainingError(
                f"{len(self.bad)} of {len(self.seen)} images are unreadable, more than data.max_bad_fraction = "
                f"{self.limit:g} allows: {listed}"
            )


class Samples:
    """A mixture seen through a frozen front, cached or computed as asked."""

    def __init__(
        self, mixture: Mixture, front: FrozenFront, *, bad: BadSamples, cached: bool, directory: Path | None = None
    ):
        """directory: of the feature caches, if not the user's."""
        self.mixture = mixture
        self.front = front
        self.bad = bad
        self.caches = (
            {id(source): FeatureCache(source, front, directory=directory) for source in mixture.sources}
            if cached
            else None
        )

    def prepare(self, rows: Sequence[int], title: str, *, each: Callable[[], None] = lambda: None) -> None:
        """Fill the caches with what the given rows of the mixture need; `each` is called before every batch."""
        if self.caches is None:
            return
        wanted: dict[int, list[int]] = {}
        for row in rows:
            source, index = self.mixture.locate(int(row))
            wanted.setdefault(id(source), []).append(index)
        for source in self.mixture.sources:
            self.caches[id(source)].ensure(wanted.get(id(source), []), title=title, each=each)

    def fetch(self, rows: Sequence[int]) -> Batch:
        """The readable ones of the given rows; there may be none.

        Raises:
            TrainingError: too many unreadable images.
        """
        ids = [self.mixture.id(int(row)) for row in rows]
        inputs: list[Tensor] = []
        kept: list[int] = []
        unreadable: list[Unreadable] = []
        if self.caches is None:
            pictures = []
            for row in rows:
                try:
                    pictures.append(self.mixture.image(int(row)))
                    kept.append(int(row))
                except DataError as error:
                    unreadable.append(Unreadable(self.mixture.id(int(row)), str(error)))
            inputs = list(self.front(pictures)) if pictures else []
        else:
            for row in rows:
                source, index = self.mixture.locate(int(row))
                cache = self.caches[id(source)]
                problems = cache.unreadable([index])
                unreadable += problems
                if not problems:
                    inputs.append(cache[[index]][0])
                    kept.append(int(row))
        self.bad.note(ids, unreadable)
        return Batch(
            [self.mixture.id(row) for row in kept],
            [self.mixture.caption(row) for row in kept],
            torch.stack(inputs) if inputs else torch.empty(0),
            skipped=[entry.id for entry in unreadable],
        )
