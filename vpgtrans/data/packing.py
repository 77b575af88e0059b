"""Which samples share a row: the pack plan of a data set, and packs of a stream.

A plan is made of lengths alone. It holds the number of every sample once, so it is kept in a file, under a key of
everything that lengths depend on.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from vpgtrans.data.pack_search import Items, Limits, lower_bound, search, sort_items
from vpgtrans.errors import DataError
from vpgtrans.files import read_arrays, write_arrays

_UNLIMITED = 1 << 40


# --- a data set ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthKey:
    """Everything that samples' lengths depend on beside this code."""

    data: str
    """The fingerprint of the data set."""
    tokenizer: str
    """The hash of the tokenizer: a transfer changes it, and with it every length."""
    prompt: str
    """Its words, its limit, and the LLM's chat template, which no hash of a tokenizer covers."""
    visual_tokens: str
    """How many an image gets, and what stands around them."""


@dataclass(frozen=True)
class PlanKey(LengthKey):
    """Everything that a plan depends on beside this code: the lengths, and the limits."""

    max_tokens: int
    max_images: int | None = None
    max_samples: int | None = None


@dataclass(frozen=True, eq=False)
class PackPlan:
    """Samples by number, pack after pack."""

    order: np.ndarray
    """int32 or int64 [samples]."""
    starts: np.ndarray
    """Where packs begin in `order`, and its end; int64 [packs + 1]."""
    tokens: np.ndarray
    """int64 [packs]."""
    images: np.ndarray
    """int64 [packs]."""
    dropped: np.ndarray
    """Samples that are in no pack, because each alone passes a limit; int64 [dropped], ascending."""
    max_tokens: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pack(self, number: int) -> np.ndarray:
        """The samples of one pack, int [k]."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.order[self.starts[number] : self.starts[number + 1]]

    @property
    def statistics(self) -> dict[str, float]:
        """`fill` is the share of real tokens in packs padded to the limit."""
        packs, tokens = len(self), int(self.tokens.sum())
        return {
            "fill": tokens / (packs * self.max_tokens) if packs else 0.0,
            "packs": packs,
            "samples": len(self.order),
            "tokens": tokens,
            "dropped": len(self.dropped),
            "tokens_per_pack": tokens / packs if packs else 0.0,
            "images_per_pack": float(self.images.mean()) if packs else 0.0,
            "samples_per_pack": len(self.order) / packs if packs else 0.0,
        }

    # --- file ---

    def save(self, path: Path, key: PlanKey) -> None:
        """One file, whole or not at all."""
        write_arrays(path, {name: getattr(self, name) for name in _ARRAYS}, key=asdict(key))

    @classmethod
    def load(cls, path: Path, key: PlanKey) -> "PackPlan":
        """
        Raises:
            DataError: the plan is of another data set, tokenizer, prompt, layout or limit, and is to be made anew.
            IntegrityError: the file is damaged.
        """
        return cls(**read_arrays(path, _ARRAYS, key=asdict(key), what="pack plan"), max_tokens=key.max_tokens)


_ARRAYS = ("order", "starts", "tokens", "images", "dropped")


def pack(
    lengths: ArrayLike,
    *,
    max_tokens: int,
    images: ArrayLike | None = None,
    max_images: int | None = None,
    max_samples: int | None = None,
) -> PackPlan:
    """Samples in as few packs as can be found, never more than first-fit decreasing makes. The same plan each time.

    A sample that alone passes a limit (more than `max_tokens` tokens or `max_images` images) is in no pack; they are
    counted.

    Args:
        lengths: tokens of each sample, visual ones included, int [n].
        images: images of each sample, int [n]; without it none has any.

    Raises:
        DataError: a limit below one, a length below one, or lengths and images that don't belong together.
    """
    limits = _limits(max_tokens, max_images, max_samples)
    items, dropped = _items(lengths, images, limits)
    packs = search(items, limits)
    count = int(packs.max(initial=-1)) + 1
    order = np.argsort(packs, kind="stable")
    starts = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.bincount(packs, minlength=count), out=starts[1:])
    short = np.int32 if len(items) + len(dropped) < 1 << 31 else np.int64
    return PackPlan(
        order=items.index[order].astype(short),
        starts=starts,
        tokens=np.bincount(packs, items.tokens, count).astype(np.int64),
        images=np.bincount(packs, items.images, count).astype(np.int64),
        dropped=dropped,
        max_tokens=max_tokens,
    )


def fewest_packs(lengths: ArrayLike, *, max_tokens: int) -> int:
    """A number of packs that no plan of these samples goes below."""
    limits = _limits(max_tokens, None, None)
    return lower_bound(_items(lengths, None, limits)[0], limits)


def _limits(max_tokens: int, max_images: int | None, max_samples: int | None) -> Limits:
    for name, limit in (("max_tokens", max_tokens), ("max_images", max_images), ("max_samples", max_samples)):
        if limit is not None and limit < 1:
            raise DataError(f"{name} is {limit}: a pack must hold at least one")
    return Limits(max_tokens, max_images or _UNLIMITED, max_samples or _UNLIMITED)


def _items(lengths: ArrayLike, images: ArrayLike | None, limits: Limits) -> tuple[Items, np.ndarray]:
    """Samples that fit a pack, and the numbers of those that don't."""
    tokens = np.asarray(lengths, dtype=np.int64)
    held = np.zeros(len(tokens), dtype=np.int64) if images is None else np.asarray(images, dtype=np.int64)
    if tokens.shape != held.shape or tokens.ndim != 1:
        raise DataError(f"lengths {tokens.shape} and images {held.shape} must be one number a sample each")
    if len(wrong := np.flatnonzero((tokens < 1) | (held < 0))):
        sample = int(wrong[0])
        raise DataError(
            f"sample {sample} has {tokens[sample]} tokens and {held[sample]} images: it must have some tokens"
        )
    fits = (tokens <= limits.tokens) & (held <= limits.images)
    index = np.flatnonzero(fits)
    return sort_items(index, tokens[index], held[index]), np.flatnonzero(~fits)


def _no_tokens(sample: int, tokens: int, images: int) -> DataError:
    return DataError(f"sample {sample} has {tokens} tokens and {images} images: at least 1 and 0 are needed")


# --- a stream -----------------------------------------------------------------------------------


class StreamPacker:
    """Packs of samples that come one by one, `window` of them held at most.

    When the window is full, its samples are packed. Packs that are nearly full leave, by their first sample; the
    emptiest stay, with at most half a window of samples, to be packed again with what comes. A sample stays at most
    `STAYS` times. The same samples give the same packs.
    """

    STAYS = 4
    FULL = 0.998

    def __init__(
        self, *, max_tokens: int, max_images: int | None = None, max_samples: int | None = None, window: int = 10_000
    ):
        """
        Raises:
            DataError: a limit or the window is below one.
        """
        self._limits = _limits(max_tokens, max_images, max_samples)
        if window < 1:
            raise DataError(f"window is {window}: it must hold at least one sample")
        self.window = window
        self._held = np.empty((4, window), dtype=np.int64)  # number, tokens, images, how often it stayed
        self._count = 0
        self.seen = 0
        """Samples so far: the number of the next one."""
        self.dropped = 0
        """Samples that alone pass a limit."""

    @property
    def held(self) -> int:
        """Samples that wait."""
        return self._count

    def add(self, tokens: int, images: int = 0) -> Iterator[np.ndarray]:
        """Packs that are done with this sample, int64 [k] numbers of samples each.

        Raises:
            DataError: the sample has no token.
        """
        if tokens < 1 or images < 0:
            raise _no_tokens(self.seen, tokens, images)
        number = self.seen
        self.seen += 1
        if tokens > self._limits.tokens or images > self._limits.images:
            self.dropped += 1
            return iter(())
        self._held[:, self._count] = number, tokens, images, 0
        self._count += 1
        return self._leave(self.window // 2) if self._count == self.window else iter(())

    def finish(self) -> Iterator[np.ndarray]:
        """The packs of all samples that are left."""
        return self._leave(0)

    def _leave(self, most: int) -> Iterator[np.ndarray]:
        """Pack what is held; all packs but the emptiest, with at most `most` samples, leave."""
        number, tokens, images, stayed = self._held[:, : self._count].copy()
        items = sort_items(np.arange(self._count), tokens, images)
        packs = np.empty(self._count, dtype=np.int64)
        packs[items.index] = search(items, self._limits)
        load = np.bincount(packs, tokens)
        size = np.bincount(packs)
        oldest = np.zeros(len(load), dtype=np.int64)
        np.maximum.at(oldest, packs, stayed)
        by_load = np.argsort(load, kind="stable")
        may_stay = (load < self.FULL * self._limits.tokens) & (oldest < self.STAYS)
        by_load = by_load[may_stay[by_load]]
        stays = np.zeros(len(load), dtype=bool)
        stays[by_load[np.cumsum(size[by_load]) <= most]] = True
        kept = stays[packs]
        self._count = int(kept.sum())
        self._held[:, : self._count] = number[kept], tokens[kept], images[kept], stayed[kept] + 1
        first = np.full(len(load), self.seen)
        np.minimum.at(first, packs, number)
        leaving = np.flatnonzero(~stays)
        order = np.argsort(packs, kind="stable")
        ends = np.cumsum(size)
        groups = [number[order[ends[pack] - size[pack] : ends[pack]]] for pack in leaving[np.argsort(first[leaving])]]
        return iter(groups)
