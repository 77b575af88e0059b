"""What the sources of a mixture hold, as an LLM sees it: counts that add up, lengths, resolutions, padding.

Measured on all rows of a source or on a fixed choice of them. Images are not decoded, their headers are read: damage
deeper in a file shows in a run alone.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from vpgtrans.data.mixture import Mixture
from vpgtrans.data.sample import Sample
from vpgtrans.data.sources import Source
from vpgtrans.errors import DataError, Dropped, rule_of
from vpgtrans.prompts import VISUAL, Encoded, Prompter

PROBLEMS = 5
"""Bad rows of a source that are named."""
GLANCE = 256
"""Rows of a source that are read before a run starts."""
_BARS = 12
"""Bars of a histogram, at most."""


@dataclass(frozen=True)
class Problem:
    """A row that can't be read: file and row as its owner would look for it, and why."""

    where: str
    reason: str


@dataclass
class SourceStats:
    """One source, measured on some of its rows: seen = used + bad + dropped."""

    source: Source
    share: float
    """Of the mixture's draws."""
    rows: Sequence[int]
    """Those measured."""
    used: int = 0
    bad: int = 0
    problems: list[Problem] = field(default_factory=list)
    """The first bad rows."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rule -> rows that it leaves out."""
    cut: Counter[str] = field(default_factory=Counter)
    """What was left out of long samples -> samples."""
    images: list[int] = field(default_factory=list)
    """Of each used sample."""
    text: list[int] = field(default_factory=list)
    """Tokens of words, of each used sample."""
    visual: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    """Tokens that the loss counts: some of those of words."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each image."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each used sample, int64 [used]."""
        return np.array(self.text, dtype=np.int64) + np.array(self.visual, dtype=np.int64)

    @property
    def tokens(self) -> float:
        """Tokens that a draw brings on average; one that is left out brings none."""
        return float(self.lengths.sum()) / len(self.rows)

    def to_json(self, *, share_of_tokens: float) -> dict[str, Any]:
        whole = len(self.rows) == len(self.source)
        return {
            "source": self.source.name,
            "layout": self.source.layout,
            "rows": len(self.source),
            "share_of_draws": self.share,
            "share_of_tokens": share_of_tokens,
            "measured": "all" if whole else "sample",
            **_counts([self]),
            **_figures([(self, 1.0)]),
            "problems": [{"where": entry.where, "reason": entry.reason} for entry in self.problems],
        }


def measure(
    source: Source,
    rows: Sequence[int],
    prompter: Prompter,
    *,
    share: float = 1.0,
    headers: bool = True,
    each: Callable[[], None] = lambda: None,
) -> SourceStats:
    """Read some rows of a source as a run would.

    Args:
        headers: read the images' too; without, a sample whose image isn't there counts as used.
        each: called after every row.
    """
    stats = SourceStats(source, share, rows)
    for row in rows:
        try:
            sample = source.sample(row)
            encoded = source.encode(sample, prompter)
            sizes = source.sizes(sample)[: encoded.images] if headers else []
        except Dropped as error:
            stats.dropped[rule_of(str(error))] += 1
        except DataError as error:
            stats.bad += 1
            if len(stats.problems) < PROBLEMS:
                where = source.rows.where(row)
                stats.problems.append(Problem(where, str(error).removeprefix(f"{where}: ")))
        else:
            visual = int((encoded.ids == VISUAL).sum())
            stats.used += 1
            stats.cut[encoded.cut] += bool(encoded.cut)
            stats.images.append(encoded.images)
            stats.text.append(len(encoded) - visual)
            stats.visual.append(visual)
            stats.answer.append(encoded.answers)
            stats.sizes += sizes
        each()
    return stats


def choose(source: Source, count: int | None, *, seed: int) -> list[int]:
    """Rows to measure, always the same ones: all of them, or at most `count`."""
    if count is None or count >= len(source):
        return list(range(len(source)))
    return sorted(Mixture([(source, 1.0)]).some(count, seed=seed))


def shares_of_tokens(measured: Sequence[SourceStats]) -> list[float]:
    """Of each source in the tokens that its mixture's draws bring."""
    brought = [stats.share * stats.tokens for stats in measured]
    return [tokens / (sum(brought) or 1.0) for tokens in brought]


def summary(measured: Sequence[SourceStats]) -> dict[str, Any]:
    """A mixture's sources, and the mixture as its draws see it."""
    shares = shares_of_tokens(measured)
    weighted = [(stats, stats.share / len(stats.rows)) for stats in measured]
    return {
        "sources": [stats.to_json(share_of_tokens=share) for stats, share in zip(measured, shares, strict=True)],
        "mixture": {
            "rows": sum(len(stats.source) for stats in measured),
            "measured": "all" if all(len(stats.rows) == len(stats.source) for stats in measured) else "sample",
            **_counts(measured),
            **_figures(weighted),
        },
        "histograms": {
            name: histogram(*_joined(weighted, name)) for name in ("length", "answer", "width", "height")
        },
    }  # fmt: skip


def outlook(mixture: Mixture, prompter: Prompter, *, seed: int) -> list[dict[str, Any]]:
    """What each source yields, from a few of its rows: no full scan. No image is touched, or its header alone."""
    pairs = zip(mixture.sources, mixture.shares, strict=True)
    measured = [
        measure(source, choose(source, GLANCE, seed=seed), prompter, share=float(share), headers=False)
        for source, share in pairs
    ]
    return [
        {
            "source": stats.source.name,
            "rows": len(stats.source),
            "draws": stats.share,
            "measured": len(stats.rows),
            "tokens": stats.tokens,
            "learnt": sum(stats.answer) / len(stats.rows),
            "images": sum(stats.images) / len(stats.rows),
            "share_of_tokens": share,
        }
        for stats, share in zip(measured, shares_of_tokens(measured), strict=True)
    ]


def _counts(measured: Sequence[SourceStats]) -> dict[str, Any]:
    dropped: Counter[str] = sum((stats.dropped for stats in measured), Counter())
    cut: Counter[str] = sum((stats.cut for stats in measured), Counter())
    return {
        "seen": sum(len(stats.rows) for stats in measured),
        "used": sum(stats.used for stats in measured),
        "bad": sum(stats.bad for stats in measured),
        "dropped": sum(dropped.values()),
        "rules": dict(dropped),
        "images": sum(sum(stats.images) for stats in measured),
        "truncated": {"turns": cut["turns"], "answer": cut["answer"]},
    }


def _figures(weighted: Sequence[tuple[SourceStats, float]]) -> dict[str, Any]:
    per_sample = {name: figures(*_joined(weighted, name)) for name in ("length", "text", "answer", "visual")}
    images, weights = _joined(weighted, "images")
    return {
        "images_per_sample": float(np.average(images, weights=weights)) if len(images) else None,
        "tokens": per_sample,
        "width": figures(*_joined(weighted, "width")),
        "height": figures(*_joined(weighted, "height")),
    }


def _joined(weighted: Sequence[tuple[SourceStats, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Values of several sources, and the weight of each value."""
    columns = [_column(stats, name) for stats, _ in weighted]
    return np.concatenate(columns), np.repeat([weight for _, weight in weighted], list(map(len, columns)))


def _column(stats: SourceStats, name: str) -> np.ndarray:
    if name == "length":
        return stats.lengths
    if name in ("width", "height"):
        return np.array([size[name == "height"] for size in stats.sizes], dtype=np.int64)
    return np.array(getattr(stats, name), dtype=np.int64)


def figures(values: np.ndarray, weights: np.ndarray) -> dict[str, float] | None:
    """Mean, smallest, median, 95th percentile and largest of weighted values; the latter are values that occur."""
    if not len(values):
        return None
    low, median, high = np.quantile(values, [0, 0.5, 0.95], weights=weights, method="inverted_cdf")
    return {
        "mean": float(np.average(values, weights=weights)),
        "min": int(low),
        "median": int(median),
        "p95": int(high),
        "max": int(values.max()),
    }


def histogram(values: np.ndarray, weights: np.ndarray) -> list[dict[str, float]]:
    """Bars of a histogram of whole numbers: `from` and `to` (inclusive) and their share of the weight.

    All bars are equally wide or, where a few values are far above the others, equally wide on a log scale.
    """
    if not len(values):
        return []
    low, high = int(values.min()), int(values.max()) + 1
    if high > 8 * max(1.0, float(np.median(values))):
        exact = np.geomspace(low + 1, high + 1, _BARS + 1) - 1
    else:
        exact = np.arange(low, high + _BARS, max(1, -(-(high - low) // _BARS)), dtype=np.float64)
    edges = np.unique(np.round(exact).astype(np.int64))
    counts, _ = np.histogram(values, edges, weights=weights)
    last = int(np.flatnonzero(counts)[-1]) + 1
    return [
        {"from": int(start), "to": int(stop) - 1, "share": float(count / counts.sum())}
        for start, stop, count in zip(edges[:last], edges[1 : last + 1], counts[:last], strict=True)
    ]


# --- padding ------------------------------------------------------------------------------------


class DrawnLengths:
    """Tokens of a run's samples in the order in which they are drawn."""

    def __init__(self, mixture: Mixture, prompter: Prompter, *, seed: int):
        self.mixture = mixture
        self.prompter = prompter
        self.seed = seed
        self._known: dict[int, int] = {}

    def __call__(self, start: int, stop: int) -> np.ndarray:
        """Of samples number `start` to `stop`, int64; those that are left out are not among them."""
        drawn = self.mixture.draws(self.seed, start, stop).tolist()
        found = [self._length(sample) for sample in drawn]
        return np.array([length for length in found if length], dtype=np.int64)

    def _length(self, sample: int) -> int:
        if sample not in self._known:
            try:
                self._known[sample] = len(self.mixture.encode(sample, self.prompter))
            except DataError:
                self._known[sample] = 0
        return self._known[sample]


def padding(lengths: np.ndarray, batch_size: int) -> float | None:
    """Share of the positions that are padding where each batch is as long as its longest sample."""
    if not len(lengths):
        return None
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - float(lengths.sum()) / sum(int(batch.max()) * len(batch) for batch in batches)


# --- samples as the LLM sees them ---------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A stretch of a sample: words that the loss counts or not, or the visual tokens of an image or a tile."""

    text: str
    learnt: bool = False
    visual: bool = False


@dataclass(frozen=True)
class Shown:
    """A sample, and what the LLM sees of it."""

    source: Source
    sample: Sample
    encoded: Encoded
    pieces: list[Piece]

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.name,
            "id": self.sample.id,
            "ids": len(self.encoded),
            "learnt": self.encoded.answers,
            "images": self.encoded.images,
            "cut": self.encoded.cut,
            "pieces": [{"text": p.text, "learnt": p.learnt, "visual": p.visual} for p in self.pieces],
        }


def show(measured: Sequence[SourceStats], prompter: Prompter, count: int, *, seed: int) -> list[Shown]:
    """At most `count` samples that can be read, of the sources in turn."""
    order = [np.random.default_rng(seed).permutation(stats.rows).tolist() for stats in measured]
    turns = [_readable(stats.source, rows, prompter) for stats, rows in zip(measured, order, strict=True)]
    found: list[Shown] = []
    while turns and len(found) < count:
        turn = turns.pop(0)
        if (shown := next(turn, None)) is not None:
            found.append(shown)
            turns.append(turn)
    return found


def _readable(source: Source, rows: Sequence[int], prompter: Prompter) -> Iterator[Shown]:
    for row in rows:
        try:
            sample = source.sample(row)
            encoded = source.encode(sample, prompter)
            source.open(sample)
        except DataError:
            continue
        yield Shown(source, sample, encoded, pieces(encoded, prompter))


def pieces(encoded: Encoded, prompter: Prompter) -> list[Piece]:
    """A sample's ids as text, special tokens included, in stretches of one kind."""
    found: list[Piece] = []
    place = 0
    tokens = [layout.tokens for layout in encoded.layouts for _ in range(layout.pieces)]
    for (visual, learnt), group in groupby(zip(encoded.ids == VISUAL, encoded.answer, strict=True), key=tuple):
        count = len(list(group))
        if visual:
            stop = place + count
            while place < stop:
                piece = tokens.pop(0)
                found.append(Piece(f"⟨{piece} visual tokens⟩", visual=True))
                place += piece
        else:
            ids = encoded.ids[place : place + count].tolist()
            text = prompter.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            found.append(Piece(text, learnt=bool(learnt)))
            place += count
    return found
