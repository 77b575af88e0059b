"""The packs of a mixture: lengths measured once and kept, a plan made of them, packs drawn in the order of a run.

lengths of all samples ──pack──▶ plan ──shuffled every epoch──▶ pack number k of a run: a pure function of (seed, k)
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from vpgtrans.data.config import PackingConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.packing import LengthKey, PackPlan, PlanKey, StreamPacker, pack
from vpgtrans.errors import DataError, Dropped
from vpgtrans.files import key_digest, read_arrays, write_arrays
from vpgtrans.fingerprint import tokenizer_sha256
from vpgtrans.progress import track
from vpgtrans.prompts import Prompter
from vpgtrans.references import cache_dir

_LOGGER = logging.getLogger(__name__)
LEFT_OUT, BAD = np.iinfo(np.int32).max, np.iinfo(np.int32).max - 1
"""In the place of a length: a sample that a rule leaves out, and one that can't be read. Longer than any pack."""
KEPT_EVERY = 30.0
"""Seconds between two times that what was counted is kept: an interrupted count goes on from there."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """Of every sample of a mixture its tokens (visual ones included) and its images, int32 [n]."""

    tokens: np.ndarray
    images: np.ndarray
    key: LengthKey
    reasons: list[str] = field(default_factory=list)
    """Why, of each sample that is left out or bad, in order."""

    @property
    def faults(self) -> np.ndarray:
        """Samples that are left out or bad, int64 [k]."""
        return np.flatnonzero(self.tokens >= BAD)

    @property
    def left_out(self) -> int:
        return int((self.tokens == LEFT_OUT).sum())

    @property
    def bad(self) -> int:
        return int((self.tokens == BAD).sum())

    def plan(self, limits: PackingConfig, rows: np.ndarray | None = None) -> PackPlan:
        """Packs of all samples, or of those at given rows, which the plan then counts from 0."""
        own = slice(None) if rows is None else rows
        return pack(
            self.tokens[own],
            images=self.images[own],
            max_tokens=limits.max_tokens,
            max_images=limits.max_images,
            max_samples=limits.max_samples,
        )

    def over_long(self, limits: PackingConfig) -> np.ndarray:
        """Samples that alone pass a limit of packs, int64 [k]."""
        return np.flatnonzero(~self.fit(limits) & (self.tokens < BAD))

    def fit(self, limits: PackingConfig) -> np.ndarray:
        """Which samples some pack holds, bool [n]."""
        fit = self.tokens <= limits.max_tokens
        return fit if limits.max_images is None else fit & (self.images <= limits.max_images)


def measure(mixture: Mixture, prompter: Prompter, *, directory: Path | None = None) -> Lengths:
    """Lengths of all samples: counted once, and kept for as long as nothing that they depend on changes.

    directory: where they are kept, if not the user's cache.

    Raises:
        IntegrityError: what is kept is damaged.
    """
    said = [prompter.config.model_dump(mode="json"), prompter.max_tokens, prompter.tokenizer.chat_template]
    key = LengthKey(
        data=hashlib.sha256("\n".join(source.fingerprint for source in mixture.sources).encode()).hexdigest(),
        tokenizer=tokenizer_sha256(prompter.tokenizer),
        prompt=json.dumps(said, sort_keys=True),
        visual_tokens=str(prompter.visual_tokens) if prompter.layouts is None else prompter.layouts.key,
    )
    path = _file(asdict(key), directory, "lengths")
    with _locked(path):
        lengths = _kept(path, key)
        if lengths is None:
            tokens, images = np.zeros((2, len(mixture)), dtype=np.int32)
            lengths = Lengths(tokens, images, key)
        uncounted = np.flatnonzero(lengths.tokens == 0)
        last = time.monotonic()
        for row in track(uncounted.tolist(), "counting tokens"):
            try:
                encoded = mixture.encode(row, prompter)
            except DataError as error:
                lengths.tokens[row] = LEFT_OUT if isinstance(error, Dropped) else BAD
                lengths.reasons.append(str(error))
            else:
                lengths.tokens[row], lengths.images[row] = len(encoded), encoded.images
            if time.monotonic() - last > KEPT_EVERY:
                _keep(lengths, path)
                last = time.monotonic()
        if len(uncounted):
            _keep(lengths, path)
    return lengths


def _kept(path: Path, key: LengthKey) -> Lengths | None:
    """What was counted so far; samples that were not have 0 tokens."""
    if not path.is_file():
        return None
    kept = read_arrays(path, ("tokens", "images", "reasons"), key=asdict(key), what="table of lengths")
    return Lengths(kept["tokens"], kept["images"], key, json.loads(kept["reasons"].tobytes()))


def _keep(lengths: Lengths, path: Path) -> None:
    reasons = np.frombuffer(json.dumps(lengths.reasons).encode(), dtype=np.uint8)
    arrays = {"tokens": lengths.tokens, "images": lengths.images, "reasons": reasons}
    write_arrays(path, arrays, key=asdict(lengths.key))


def plan_packs(lengths: Lengths, limits: PackingConfig, *, directory: Path | None = None) -> tuple[PackPlan, Path]:
    """The plan of all samples within some limits, made once and kept like the lengths; and its file.

    Raises:
        DataError: no sample fits. IntegrityError: what is kept is damaged.
    """
    key = PlanKey(**asdict(lengths.key), **limits.model_dump())
    path = _file(asdict(key), directory, "plan")
    with _locked(path):
        if path.is_file():
            _LOGGER.info("nothing changed since these packs were planned: %s", path)
            plan = PackPlan.load(path, key)
        else:
            plan = lengths.plan(limits)
            plan.save(path, key)
    if not len(plan):
        shortest = int(lengths.tokens.min(initial=BAD))
        raise DataError(
            f"data.packing: no sample fits a pack of {limits.max_tokens:,} tokens"
            + (f"; the shortest has {shortest:,}" if shortest < BAD else ", because none can be read")
        )
    return plan, path


def in_a_batch(limits: PackingConfig, batch_size: int) -> PackingConfig:
    """The limits of packs that an update of `batch_size` samples is made of: none holds more than all of it."""
    return limits.model_copy(update={"max_samples": min(limits.max_samples or batch_size, batch_size)})


def _file(key: dict[str, Any], directory: Path | None, kind: str) -> Path:
    return (directory or cache_dir() / "packs") / f"{key_digest(key)[:32]}.{kind}.safetensors"


def _locked(path: Path) -> FileLock:
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(str(path.with_suffix(".lock")))


# --- order --------------------------------------------------------------------------------------


class PackOrder:
    """The packs of a run, as one sequence without end. Pack number k is a pure function of (seed, k).

    Where every epoch draws each sample once, it is the plan's packs, shuffled. Where sources or rows have weights, the
    epoch's draws are packed. Where rows are cheap to read only in stretches, packs are made of what is near in the
    epoch's order, with what fits badly carried over.
    """

    def __init__(self, mixture: Mixture, lengths: Lengths, plan: PackPlan, limits: PackingConfig, *, seed: int):
        self.mixture = mixture
        self.lengths = lengths
        self.limits = limits
        self.seed = seed
        self._plan = plan
        self._ends = [0]

    def within(self, limits: PackingConfig) -> "PackOrder":
        """The same samples in packs of other limits."""
        return PackOrder(self.mixture, self.lengths, self.lengths.plan(limits), limits, seed=self.seed)

    def packs(self, start: int, stop: int) -> list[np.ndarray]:
        """The samples of the run's packs number `start` to `stop`, int64 [k] each."""
        found: list[np.ndarray] = []
        epoch = 0
        while start < stop:
            while start >= self._end(epoch):
                epoch += 1
            rows, starts = self._epoch(epoch)
            first, last = self._end(epoch - 1), min(stop, self._end(epoch))
            found += [rows[starts[pack] : starts[pack + 1]] for pack in range(start - first, last - first)]
            start = last
        return found

    def _end(self, epoch: int) -> int:
        """Packs of all epochs up to this one."""
        while len(self._ends) <= epoch + 1:
            count = len(self._plan) if self.mixture.even else len(self._epoch(len(self._ends) - 1)[1]) - 1
            self._ends.append(self._ends[-1] + count)
        return self._ends[epoch + 1]

    @property
    def samples_per_pack(self) -> float:
        """In the first epoch; DataError as `tokens_per_pack`."""
        rows, packs = self._first_epoch
        return len(rows) / packs

    @property
    def tokens_per_pack(self) -> float:
        """In the first epoch.

        Raises:
            DataError: nothing that it draws fits a pack.
        """
        rows, packs = self._first_epoch
        return float(self.lengths.tokens[rows].sum()) / packs

    @property
    def _first_epoch(self) -> tuple[np.ndarray, int]:
        """Its samples, and how many packs hold them."""
        rows, starts = self._epoch(0)
        if not len(rows):
            raise DataError(
                f"data.packing: no sample of the first epoch fits a pack of {self.limits.max_tokens:,} tokens; right "
                "would be longer packs, or more weight for sources whose samples fit"
            )
        return rows, len(starts) - 1

    @cached_property
    def _epoch(self) -> Any:
        return lru_cache(maxsize=2)(self._packed)

    def _packed(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The packs of one epoch: rows of the mixture, pack after pack, and where packs begin, and the end."""
        order = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        if self.mixture.even:
            return _shuffled(self._plan.order, self._plan.starts, order)
        draws = self.mixture.order(self.seed, epoch)
        if self.mixture.reach is not None:
            return self._near(draws, self.mixture.reach)
        plan = self.lengths.plan(self.limits, draws)
        return _shuffled(draws[plan.order], plan.starts, order)

    def _near(self, draws: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
        packer = StreamPacker(**self.limits.model_dump(), window=reach)
        packs: list[np.ndarray] = []
        for tokens, images in zip(
            self.lengths.tokens[draws].tolist(), self.lengths.images[draws].tolist(), strict=True
        ):
            packs += packer.add(tokens, images)
        packs += packer.finish()
        return draws[np.concatenate([*packs, np.empty(0, dtype=np.int64)])], np.cumsum([0, *map(len, packs)])

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_epoch"}


def _shuffled(rows: np.ndarray, starts: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Packs in another order: those of a plan are sorted by what they are made of."""
    order = generator.permutation(len(starts) - 1)
    sizes = np.diff(starts)[order]
    ends = np.cumsum(sizes)
    index = np.repeat(starts[order] - np.concatenate(([0], ends[:-1])), sizes) + np.arange(len(rows))
    return rows[index].astype(np.int64), np.concatenate(([0], ends))
