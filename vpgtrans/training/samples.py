"""Samples on their way into the model: rows of a data set, with their images as far as the frozen front took them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpgtrans.config import AugmentConfig
from vpgtrans.data.config import PackingConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.packs import BAD, Lengths
from vpgtrans.data.sample import Sample
from vpgtrans.data.sources import Source
from vpgtrans.errors import DataError, Dropped, TrainingError
from vpgtrans.layout import Size
from vpgtrans.prompts import Encoded, Prompter, Text
from vpgtrans.training.features import FeatureCache, FrozenFront, Images, Levels
from vpgtrans.vision.augment import random_view
from vpgtrans.vision.preprocess import Color


@dataclass
class Batch:
    """One optimizer update's samples (or a slice of them).

    Attributes:
        ids: sample ids. texts: what they say. encoded: the same as token ids.
        inputs: [n, …] of all their images' pieces in order, by the level of the frozen front: resized images, patches
            or visual tokens; a list where images have their native size.
        skipped: ids of the samples that are left out, because they can't be read or by a rule; B may be 0.
        packs: of each sample the number of its pack, in order; None where each has a row. A part is one pack.
    """

    ids: list[str]
    texts: list[Text]
    encoded: list[Encoded]
    inputs: Levels
    skipped: list[str] = field(default_factory=list)
    packs: list[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "Batch":
        ends = [0, *accumulate(text.pieces for text in self.encoded)]
        images = slice(ends[min(start, len(self))], ends[min(stop, len(self))])
        own = slice(start, stop)
        packs = None if self.packs is None else self.packs[own]
        return Batch(self.ids[own], self.texts[own], self.encoded[own], self.inputs[images], packs=packs)

    def parts(self, size: int | None) -> Iterator["Batch"]:
        """What goes through the model at once: a pack, or `size` samples (None: all)."""
        if not len(self):
            return
        if self.packs is not None:
            ends = [place for place in range(1, len(self)) if self.packs[place] != self.packs[place - 1]]
            bounds = [0, *ends, len(self)]
        else:
            bounds = [*range(0, len(self), size or len(self)), len(self)]
        for start, stop in pairwise(bounds):
            yield self.part(start, stop)

    def beside(self, other: "Batch") -> "Batch":
        """With the samples of another batch after those of this one, which has no images; of a pack, in the same."""
        return Batch(
            self.ids + other.ids,
            [*self.texts, *other.texts],
            self.encoded + other.encoded,
            other.inputs,
            packs=None if self.packs is None else self.packs + self.packs[-1:] * len(other.encoded),
        )

    def packed(self, max_tokens: int) -> "Batch":
        """The samples in this order in packs of at most so many tokens; a longer one has a pack to itself."""
        packs: list[int] = []
        pack = room = 0
        for text in self.encoded:
            if len(text) > room:
                pack, room = pack + 1, max_tokens
            room -= len(text)
            packs.append(pack)
        return replace(self, packs=packs)

    def to(self, device: torch.device) -> "Batch":
        if isinstance(self.inputs, Tensor):
            return replace(self, inputs=self.inputs.to(device, non_blocking=True))
        return replace(self, inputs=[piece.to(device, non_blocking=True) for piece in self.inputs])

    @property
    def answer_tokens(self) -> int:
        """Tokens that the caption loss counts."""
        return sum(text.answers for text in self.encoded)


Key = tuple[str, int]
"""Which mixture of a run (train, validation), and the sample in it."""


@dataclass(frozen=True)
class Unreadable:
    """A sample that was skipped, and why."""

    key: Key
    id: str
    reason: str
    dropped: bool = False
    """By a stated rule, not because it is damaged."""


WINDOW = 1000
"""Of a stage that reads its images as it goes, as many samples are taken to come, if it has as many."""


@dataclass
class BadSamples:
    """Samples that are left out so far: counted and listed, and too many bad ones stop the run.

    Bad ones can't be read; they are too many if they are more than one, and more than the share `limit` of all distinct
    samples that count. In a stage whose features are cached these are all that it visits, validation included, and it
    is decided before the first update. In another one these are the samples seen so far, or the first `WINDOW` (all, if
    there are fewer) as long as fewer were seen: a few bad ones may come first, and a data set that is bad throughout
    stops soon. Samples that a rule leaves out are no bad ones.
    """

    limit: float
    seen: int = 0
    """Distinct samples."""
    bad: dict[Key, "Unreadable"] = field(default_factory=dict)
    dropped: dict[Key, "Unreadable"] = field(default_factory=dict)
    """Left out by a rule."""
    aside: dict[Key, "Unreadable"] = field(default_factory=dict)
    """Bad ones that no pack holds: all of a mixture's are known before the first update, and judged among all."""
    expected: int = 0
    """Samples that count even if fewer were seen so far."""
    shared: bool = False
    """Several processes read a share each: `check` is called when they have exchanged what is bad."""
    earlier: dict[str, str] = field(default_factory=dict)
    """Reason -> id of those that a resumed run had listed before it stopped; they count when they come up again."""
    _unpacked: int = 0
    """Of `seen`, those that no pack holds: they say nothing of how many others were read."""
    _met: dict[Mixture, np.ndarray] = field(default_factory=dict)

    def see(self, mixture: Mixture, rows: Sequence[int] | np.ndarray) -> int:
        """Mark samples as seen, in whatever stage; returns how many of them are new. `note` counts them."""
        met = self._met.setdefault(mixture, np.zeros(len(mixture), dtype=bool))
        some = np.unique(np.asarray(rows, dtype=np.int64))
        new = int((~met[some]).sum())
        met[some] = True
        return new

    @property
    def quarantined(self) -> int:
        """Samples that can't be read."""
        return len(self.bad) + len(self.aside)

    @property
    def left_out(self) -> int:
        return self.quarantined + len(self.dropped)

    @property
    def listed(self) -> dict[str, str]:
        """Reason, which names file and row, -> id of all that are bad."""
        return self.earlier | {entry.reason: entry.id for entry in [*self.aside.values(), *self.bad.values()]}

    def note(self, unreadable: Sequence["Unreadable"], *, seen: int = 0) -> None:
        """Count a batch, of which `seen` samples were not seen before.

        Raises:
            TrainingError: too many samples are bad.
        """
        self.seen += seen
        self._list(unreadable, self.bad)
        if not self.shared:
            self.check()

    def set_aside(self, unreadable: Sequence["Unreadable"], *, seen: int, of: int) -> None:
        """Count samples that no pack holds, of a mixture of so many; `seen` of them were not seen before.

        Raises:
            TrainingError: too many of the mixture's samples are bad.
        """
        self.seen += seen
        self._unpacked += seen
        self._list(unreadable, self.aside)
        self._judge(self.aside, of, of)

    def check(self) -> None:
        """Raises TrainingError if too many samples are bad."""
        seen = self.seen - self._unpacked
        self._judge(self.bad, seen, max(seen, self.expected))

    def _list(self, unreadable: Sequence["Unreadable"], bad: dict[Key, "Unreadable"]) -> None:
        for entry in unreadable:
            listed = self.dropped if entry.dropped else bad
            if not entry.dropped and entry.key not in listed:
                logging.getLogger(__name__).warning("skipped %s: %s", entry.id, entry.reason)
            listed[entry.key] = entry

    def _judge(self, bad: dict[Key, "Unreadable"], seen: int, count: int) -> None:
        if len(bad) > max(1.0, self.limit * count):
            listed = "; ".join(f"{entry.id}: {entry.reason}" for entry in list(bad.values())[:5])
            of = f" of {count}" if count > seen else ""
            raise TrainingError(
                f"{len(bad)} of {seen} samples are unreadable, more than data.max_bad_fraction = {self.limit:g} "
                f"allows{of}: {listed}"
            )


class View:
    """Images of a source, each in its augmented view of a given number."""

    def __init__(self, source: Images, config: AugmentConfig, number: int, *, background: Color):
        self.source = source
        self.config = config
        self.number = number
        self.background = background

    @property
    def fingerprint(self) -> str:
        """Of the source, the augmentation and the view."""
        config = self.config.model_dump_json(exclude={"views"})
        return f"{self.source.fingerprint} view {self.number} on {self.background} of {config}"

    def __len__(self) -> int:
        return len(self.source)

    def id(self, row: int) -> str:
        return self.source.id(row)

    def image(self, row: int) -> Image.Image:
        return augmented(self.source.image(row), self.config, self.number, row, background=self.background)

    def sized(self, row: int) -> tuple[Image.Image, Size]:
        image, size = self.source.sized(row)
        return augmented(image, self.config, self.number, row, background=self.background), size

    def reopen(self) -> None:
        self.source.reopen()


def augmented(
    image: Image.Image, config: AugmentConfig, view: int, row: int, *, background: Color, place: int = 0
) -> Image.Image:
    """A view of an image, which depends on its number, the sample's row and the image's place in it alone."""
    seed = (view, row, place) if place else (view, row)
    return random_view(image, config, seed=seed, background=background)


@dataclass
class Loaded:
    """A batch as a loading process hands it on: rows from caches, the other images resized."""

    ids: list[str]
    texts: list[Text]
    encoded: list[Encoded]
    rows: Tensor
    """[m, …] of the pieces of images that are cached, in order."""
    levels: Levels
    """uint8 [n, 3, S, S] of the others, in order: what goes through shared memory is a quarter of their pixels."""
    cached: list[bool]
    """Of each piece, whether it is among `rows`."""
    unreadable: list[Unreadable]
    packs: list[int] | None = None
    """See `Batch`."""

    def pin_memory(self) -> "Loaded":
        """torch's loader calls this where the batch goes to a GPU."""
        whole, rows = self.levels, self.rows.pin_memory()
        levels = whole.pin_memory() if isinstance(whole, Tensor) else [level.pin_memory() for level in whole]
        return replace(self, rows=rows, levels=levels)


class Samples:
    """A mixture seen through a frozen front, cached or computed as asked.

    `fetch` is `load`, which reads, decodes, resizes and tokenises, in another process where there are any; and
    `finish`, which runs the frozen front.
    """

    def __init__(
        self,
        mixture: Mixture,
        front: FrozenFront,
        prompter: Prompter,
        *,
        bad: BadSamples,
        cached: bool,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        directory: Path | None = None,
        role: str = "train",
    ):
        """augment, seed: views of the images that are fetched with a position. directory: of the feature caches, if
        not the user's. role: which of a run's mixtures this is."""
        self.role = role
        self.mixture = mixture
        self.front = front
        self.prompter = prompter
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
        workers: int = 0,
    ) -> list[Unreadable]:
        """Fill the caches with what `fetch` of the same rows needs; `each` is called before every batch.

        Returns the unreadable ones of these rows; none is known where nothing is cached.
        """
        wanted: dict[tuple[int, int], dict[int, int]] = {}  # source and view -> row in it -> row of the mixture
        for sample, (source, row, view) in zip(rows, self._places(rows, positions), strict=True):
            if self._is_cached(source):
                self._cache(source, view)
                wanted.setdefault((self.mixture.sources.index(source), view), {})[row] = int(sample)
        found: list[Unreadable] = []
        for key, places in sorted(wanted.items(), key=lambda item: item[0][1]):
            named, cache = f"{title}, view {key[1]}" if key[1] else title, self._caches[key]
            cache.ensure(list(places), title=named, each=each, workers=workers)
            for row, reason in sorted(cache.unreadable(places).items()):
                name = self.mixture.sources[key[0]].id(row)
                found.append(Unreadable((self.role, places[row]), name, reason))
        return found

    def see(self, rows: Sequence[int] | np.ndarray) -> int:
        """Mark rows as seen; returns how many of them are new."""
        return self.bad.see(self.mixture, rows)

    def reopen(self) -> None:
        """In a process that was forked: let go of open files and connections, which two must not share."""
        for source in self.mixture.sources:
            source.reopen()

    def fetch(self, rows: Sequence[int], *, positions: Sequence[int] | None = None) -> Batch:
        """The readable ones of the given rows; there may be none.

        Args:
            positions: place of each row in the run's order, which chooses its augmented view; None: as they are.

        Raises:
            TrainingError: too many unreadable samples.
        """
        return self.finish(self.load(rows, positions=positions), seen=self.see(rows))

    def load(
        self,
        rows: Sequence[int],
        *,
        positions: Sequence[int] | None = None,
        packs: Sequence[int] | None = None,
    ) -> Loaded:
        """Everything that needs no model. packs: of each row the number of its pack."""
        ids: list[str] = []
        texts: list[Text] = []
        encodings: list[Encoded] = []
        cached: list[bool] = []
        stored: list[Tensor] = []
        levels: list[Tensor] = []
        unreadable: list[Unreadable] = []
        kept: list[int] = []
        for place, (source, row, view) in enumerate(self._places(rows, positions)):
            try:
                sample = source.sample(row)
                images: list[Image.Image] | None = None
                if self.prompter.layouts is None or self._has_row(source, sample):
                    encoded = source.encode(sample, self.prompter)
                else:
                    images, sizes = source.open_sized(sample)
                    with source.at(row):
                        encoded = self.prompter.encode(sample.text, sizes)
                found, new = self._images(source, sample, row, view, encoded=encoded, images=images)
            except DataError as error:
                dropped = isinstance(error, Dropped)
                key = self.role, int(rows[place])
                unreadable.append(Unreadable(key, source.id(row), str(error), dropped=dropped))
                continue
            kept.append(place)
            stored += found
            levels += new
            cached += [bool(found)] * encoded.pieces
            ids.append(sample.id)
            texts.append(sample.text)
            encodings.append(encoded)
        return Loaded(
            ids,
            texts,
            encodings,
            torch.cat(stored) if stored else torch.empty(0),
            self._together(levels),
            cached,
            unreadable,
            packs=None if packs is None else [int(packs[place]) for place in kept],
        )

    def set_aside(self, lengths: Lengths, limits: PackingConfig) -> None:
        """Count what no pack holds: what alone passes a limit of packs, what a rule leaves out, what is bad.

        Raises:
            TrainingError: too many samples are bad.
        """
        images = "" if limits.max_images is None else f" and {limits.max_images} images"
        rule = f"longer than a pack of {limits.max_tokens} tokens{images}"
        over_long = lengths.over_long(limits)
        found = []
        for row, reason in [*((row, None) for row in over_long), *zip(lengths.faults, lengths.reasons, strict=True)]:
            source, index = self.mixture.locate(int(row))
            why = reason or f"{source.rows.where(index)}: {rule}"
            dropped = lengths.tokens[row] != BAD
            found.append(Unreadable((self.role, int(row)), source.id(index), why, dropped=dropped))
        new = self.see(np.concatenate([over_long, lengths.faults]))
        self.bad.set_aside(found, seen=new, of=len(self.mixture))

    def finish(self, loaded: Loaded, *, seen: int = 0) -> Batch:
        """What the model takes.

        Raises:
            TrainingError: too many unreadable samples.
        """
        self.bad.note(loaded.unreadable, seen=seen)
        inputs: Levels = loaded.rows
        if len(loaded.levels):
            new = self.front.of_levels(loaded.levels)
            if len(inputs) and isinstance(new, Tensor):
                order = torch.tensor(loaded.cached)
                both = new.new_empty((len(order), *new.shape[1:]))
                both[order], both[~order] = loaded.rows.to(new.dtype), new
                inputs = both
            else:
                inputs = new
        return Batch(
            loaded.ids,
            loaded.texts,
            loaded.encoded,
            inputs,
            skipped=[entry.id for entry in loaded.unreadable],
            packs=loaded.packs,
        )

    def _images(
        self,
        source: Source,
        sample: Sample,
        row: int,
        view: int,
        *,
        encoded: Encoded,
        images: list[Image.Image] | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of the images that are in the text the cached rows, or the resized pieces, [pieces, …] an image.

        images: of the sample, if they are open.
        """
        if not encoded.images:
            return [], []
        if self._has_row(source, sample):
            cache = self._cache(source, view)
            if problems := cache.unreadable([row]):
                raise DataError(problems[row])
            return [cache.pieces(row, encoded.pieces)], []
        images = (source.open(sample) if images is None else images)[: encoded.images]
        if view and self.augment is not None:
            images = [
                augmented(image, self.augment, view, row, background=self._background, place=place)
                for place, image in enumerate(images)
            ]
        transform = self.front.vpg.transform
        return [], [transform.pieces(image, layout) for image, layout in zip(images, encoded.layouts, strict=True)]

    def _together(self, levels: Sequence[Tensor]) -> Levels:
        """Pieces of several images as one tensor, or as a list where they have their own shapes."""
        if self.prompter.layouts is not None and self.prompter.layouts.native:
            return [piece for pieces in levels for piece in pieces]
        return torch.cat(list(levels)) if levels else torch.empty(0)

    def _has_row(self, source: Source, sample: Sample) -> bool:
        return self._is_cached(source) and len(sample.images) == 1

    def _places(self, rows: Sequence[int], positions: Sequence[int] | None) -> Iterator[tuple[Source, int, int]]:
        """Source, row in it, and number of the view (0: the image as it is) of each row of the mixture."""
        for number, row in enumerate(rows):
            source, index = self.mixture.locate(int(row))
            view = 0
            if self.augment is not None and positions is not None:
                random = np.random.default_rng((self.seed, int(positions[number])))
                view = 1 + int(random.integers(self.augment.views or 2**62))
            yield source, index, view

    @property
    def _background(self) -> Color:
        return self.front.vpg.transform.config.background

    def _is_cached(self, source: Source) -> bool:
        """A cache has one row an image, so it takes sources whose samples have one."""
        return self.cached and source.single

    def _cache(self, source: Source, view: int) -> FeatureCache:
        key = self.mixture.sources.index(source), view
        if key not in self._caches:
            seen: Images = source
            if view and self.augment is not None:
                seen = View(source, self.augment, view, background=self._background)
            self._caches[key] = FeatureCache(seen, self.front, directory=self.directory)
        return self._caches[key]
