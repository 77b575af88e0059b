"""Samples on their way into the model: rows of a data set, with their images as far as the frozen front took them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpgtrans.config import AugmentConfig
from vpgtrans.data.sources import Captions, Mixture
from vpgtrans.errors import DataError, TrainingError
from vpgtrans.training.features import FeatureCache, FrozenFront, Images, Unreadable
from vpgtrans.vision.augment import random_view
from vpgtrans.vision.preprocess import Color


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


WINDOW = 1000
"""Of a stage that reads its images as it goes, as many samples are taken to come, if it has as many."""


@dataclass
class BadSamples:
    """Unreadable images so far: they are skipped, counted and listed, and too many of them stop the run.

    Too many: more than one, and more than the share `limit` of all distinct samples that count. In a stage whose
    features are cached these are all that it visits, validation included, and it is decided before the first update.
    In another one these are the samples seen so far, or the first `WINDOW` (all, if there are fewer) as long as fewer
    were seen: a few bad ones may come first, and a data set that is bad throughout stops soon.
    """

    limit: float
    seen: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)
    expected: int = 0
    """Samples that count even if fewer were seen so far."""
    shared: bool = False
    """Several processes read a share each: `check` is called when they have exchanged what is bad."""
    earlier: dict[str, str] = field(default_factory=dict)
    """Those that a resumed run had listed before it stopped; they count again when they come up again."""

    @property
    def listed(self) -> dict[str, str]:
        """Sample id -> reason of all that were skipped."""
        return self.earlier | self.bad

    def note(self, ids: Sequence[str], unreadable: Sequence[Unreadable]) -> None:
        """Count a batch.

        Raises:
            TrainingError: too many samples are unreadable.
        """
        self.seen.update(ids)
        for entry in unreadable:
            if entry.id not in self.bad:
                logging.getLogger(__name__).warning("skipped %s: %s", entry.id, entry.reason)
                self.bad[entry.id] = entry.reason
        if not self.shared:
            self.check()

    def check(self) -> None:
        """Raises TrainingError if too many samples are unreadable."""
        count = max(len(self.seen), self.expected)
        if len(self.bad) > max(1.0, self.limit * count):
            listed = "; ".join(f"{name}: {reason}" for name, reason in list(self.bad.items())[:5])
            of = f" of {count}" if count > len(self.seen) else ""
            raise TrainingError(
                f"{len(self.bad)} of {len(self.seen)} images are unreadable, more than data.max_bad_fraction = "
                f"{self.limit:g} allows{of}: {listed}"
            )


class View:
    """Images of a source, each in its augmented view of a given number."""

    def __init__(self, source: Images, config: AugmentConfig, number: int, *, background: Color):
        self.source = source
        self.config = config
        self.number = number
        self.background = background

    @property
    def ids(self) -> Sequence[str]:
        return self.source.ids

    @property
    def fingerprint(self) -> str:
        """Of the source, the augmentation and the view."""
        config = self.config.model_dump_json(exclude={"views"})
        return f"{self.source.fingerprint} view {self.number} on {self.background} of {config}"

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Image.Image:
        image = self.source.image(index)
        return random_view(image, self.config, seed=(self.number, index), background=self.background)


class Samples:
    """A mixture seen through a frozen front, cached or computed as asked."""

    def __init__(
        self,
        mixture: Mixture,
        front: FrozenFront,
        *,
        bad: BadSamples,
        cached: bool,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        directory: Path | None = None,
    ):
        """augment, seed: views of the images that are fetched with a position. directory: of the feature caches, if
        not the user's."""
        self.mixture = mixture
        self.front = front
        self.bad = bad
        self.cached = cached
        self.augment = augment
        self.seed = seed
        self.directory = directory
        self._caches: dict[tuple[int, int], FeatureCache] = {}

    def prepare(
        self,
        rows: Sequence[int],
        title: str,
        *,
        positions: Sequence[int] | None = None,
        each: Callable[[], None] = lambda: None,
    ) -> list[Unreadable]:
        """Fill the caches with what `fetch` of the same rows needs; `each` is called before every batch.

        Returns the unreadable ones of these rows; none is known where nothing is cached.
        """
        if not self.cached:
            return []
        wanted: dict[tuple[int, int], list[int]] = {}
        for source, index, view in self._places(rows, positions):
            self._cache(source, view)
            wanted.setdefault((id(source), view), []).append(index)
        for key, indices in sorted(wanted.items(), key=lambda item: item[0][1]):
            self._caches[key].ensure(indices, title=f"{title}, view {key[1]}" if key[1] else title, each=each)
        return [
            entry for key, indices in wanted.items() for entry in self._caches[key].unreadable(sorted(set(indices)))
        ]

    def see(self, rows: Sequence[int]) -> None:
        """Count rows of which this process fetches its share."""
        if self.bad.shared:
            self.bad.seen.update(self.mixture.id(row) for row in rows)

    def fetch(self, rows: Sequence[int], *, positions: Sequence[int] | None = None) -> Batch:
        """The readable ones of the given rows; there may be none.

        Args:
            positions: place of each row in the run's order, which chooses its augmented view; None: as they are.

        Raises:
            TrainingError: too many unreadable images.
        """
        ids = [self.mixture.id(int(row)) for row in rows]
        inputs: list[Tensor] = []
        pictures: list[Image.Image] = []
        kept: list[int] = []
        unreadable: list[Unreadable] = []
        for row, (source, index, view) in zip(rows, self._places(rows, positions), strict=True):
            if self.cached:
                cache = self._cache(source, view)
                problems = cache.unreadable([index])
                if not problems:
                    inputs.append(cache[[index]][0])
            else:
                problems = []
                try:
                    pictures.append(self._images(source, view).image(index))
                except DataError as error:
                    problems.append(Unreadable(source.ids[index], str(error)))
            unreadable += problems
            if not problems:
                kept.append(int(row))
        if pictures:
            inputs = list(self.front(pictures))
        self.bad.note(ids, unreadable)
        return Batch(
            [self.mixture.id(row) for row in kept],
            [self.mixture.caption(row) for row in kept],
            torch.stack(inputs) if inputs else torch.empty(0),
            skipped=[entry.id for entry in unreadable],
        )

    def _places(self, rows: Sequence[int], positions: Sequence[int] | None) -> Iterator[tuple[Captions, int, int]]:
        """Source, row in it, and number of the view (0: the image as it is) of each row of the mixture."""
        for number, row in enumerate(rows):
            source, index = self.mixture.locate(int(row))
            view = 0
            if self.augment is not None and positions is not None:
                random = np.random.default_rng((self.seed, int(positions[number])))
                view = 1 + int(random.integers(self.augment.views or 2**62))
            yield source, index, view

    def _images(self, source: Captions, view: int) -> Images:
        if view == 0 or self.augment is None:
            return source
        return View(source, self.augment, view, background=self.front.vpg.transform.config.background)

    def _cache(self, source: Captions, view: int) -> FeatureCache:
        key = id(source), view
        if key not in self._caches:
            self._caches[key] = FeatureCache(self._images(source, view), self.front, directory=self.directory)
        return self._caches[key]
