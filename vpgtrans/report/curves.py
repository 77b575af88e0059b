"""Curves out of logged figures: one run's losses by samples seen, and several arms' by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from vpgtrans.errors import DataError
from vpgtrans.report.format import is_number

Point = tuple[float, float]
"""(samples seen, value)."""

SCRATCH = "scratch"
"""The arm that every other is measured against."""


@dataclass
class RunCurves:
    """Everything that metrics.jsonl says about the course of one run, over samples of all stages together."""

    train: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    validated_in: list[str] = field(default_factory=list)
    """The stage of each validation: one stage's last and the next one's first stand at the same samples."""
    rates: dict[str, list[Point]] = field(default_factory=dict)
    """Learning rate by part; the key is empty where one rate holds for all."""
    stages: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, samples at its start, samples at its end)."""

    @property
    def best(self) -> Point | None:
        return min(self.validation, key=lambda point: point[1]) if self.validation else None


def run_curves(metrics: Sequence[dict[str, Any]]) -> RunCurves:
    """Sort metrics.jsonl's lines into curves.

    `samples` may count on over stages or anew in each: where a stage begins below the one before it, it is shifted.
    A resumed run logs some updates twice; the later line counts.
    """
    latest = {(str(line.get("stage", "")), line.get("update"), "val_loss" in line): line for line in metrics}
    curves = RunCurves()
    current, offset, start, seen = None, 0.0, 0.0, 0.0
    for (stage, _, is_validation), line in latest.items():
        if not is_number(line.get("samples")):
            continue
        if stage != current:
            if current is not None:
                curves.stages.append((current, start, seen))
            offset = seen if line["samples"] < seen else 0.0
            current, start = stage, seen
        samples = float(line["samples"]) + offset
        seen = max(seen, samples)
        if is_validation:
            if is_number(line["val_loss"]):
                curves.validation.append((samples, line["val_loss"]))
                curves.validated_in.append(stage)
            continue
        if is_number(line.get("loss")):
            curves.train.append((samples, line["loss"]))
        rate = line.get("lr")
        for part, value in (rate if isinstance(rate, dict) else {"": rate}).items():
            if is_number(value):
                curves.rates.setdefault(str(part), []).append((samples, value))
    if current is not None:
        curves.stages.append((current, start, seen))
    return curves


def smooth(points: Sequence[Point], *, window: int) -> list[Point]:
    """Centred running mean over `window` points, shorter at both ends."""
    half = window // 2
    values = [value for _, value in points]
    return [(samples, float(np.mean(values[max(0, i - half) : i + half + 1]))) for i, (samples, _) in enumerate(points)]


def thin(points: Sequence[Point], *, most: int = 500) -> list[Point]:
    """At most about `most` points, evenly taken, the last one kept."""
    step = max(1, math.ceil(len(points) / most))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison."""

    name: str
    curves: list[list[Point]]
    """One a seed that has a finite loss, sorted by samples."""
    best: list[float]
    """Best validation loss, one a seed."""
    seconds: list[float]
    reached: list[float]
    """Samples at which each seed first was at or below scratch's best of the same seed; infinite where never."""
    speedup: dict[str, Any] | None

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Samples, median, minimum and maximum over seeds, where every seed has a curve."""
        grid = np.unique([samples for curve in self.curves for samples, _ in curve])
        grid = grid[(grid >= max(c[0][0] for c in self.curves)) & (grid <= min(c[-1][0] for c in self.curves))]
        if not len(grid):  # seeds measured at places without overlap: the first seed alone
            grid = np.array([samples for samples, _ in self.curves[0]])
            stack = np.array([[value for _, value in self.curves[0]]])
        else:
            stack = np.stack([np.interp(grid, *np.array(curve).T) for curve in self.curves])
        return grid, np.median(stack, axis=0), stack.min(axis=0), stack.max(axis=0)

    @property
    def reached_median(self) -> float:
        return median(self.reached) if self.reached else math.inf


def compare_arms(summary: dict[str, Any]) -> list[Arm]:
    """The arms of compare's summary, in its order.

    Raises:
        DataError: no arms, an arm without a curve of [samples, validation loss] pairs, or one with fewer or more
        curves than scratch.
    """
    arms = summary.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise DataError('the summary has no "arms": it is not the summary.json of a comparison')
    seeds = {name: _seed_curves(name, arm) for name, arm in arms.items()}
    speedup = summary.get("speedup") or {}
    result = []
    for name, arm in arms.items():
        curves = [curve for curve in seeds[name] if curve]
        best = [value for value in arm.get("val_loss") or [] if is_number(value)]
        result.append(
            Arm(
                name=str(name),
                curves=curves,
                best=best or [min(value for _, value in curve) for curve in curves],
                seconds=[value for value in arm.get("seconds") or [] if is_number(value)],
                reached=_reached(name, seeds[name], seeds[SCRATCH]) if SCRATCH in seeds else [],
                speedup=speedup.get(name),
            )
        )
    return result


def scratch_best(arms: Sequence[Arm]) -> float | None:
    """Median over seeds of scratch's best validation loss; None without such an arm."""
    return next((median(arm.best) for arm in arms if arm.name == SCRATCH), None)


def _seed_curves(name: str, arm: dict[str, Any]) -> list[list[Point]]:
    """One a seed, empty where a seed has no finite loss; but not all of them."""
    raw = arm.get("curves") or [arm.get("curve") or []]
    curves = [sorted((float(x), float(y)) for x, y in curve if is_number(x) and is_number(y)) for curve in raw]
    if not any(curves):
        raise DataError(f'arm {name!r}: "curves" and "curve" hold no [samples, validation loss] pair')
    return curves


def _reached(name: str, curves: list[list[Point]], scratch: list[list[Point]]) -> list[float]:
    """See `Arm.reached`; a seed whose scratch has no finite loss is left out."""
    if len(curves) != len(scratch):
        raise DataError(f"arm {name!r}: {len(curves)} curves, scratch has {len(scratch)}; right would be one a seed")
    pairs = [(curve, goal) for curve, goal in zip(curves, scratch, strict=True) if goal]
    return [_first_at(curve, min(value for _, value in goal)) for curve, goal in pairs]


def _first_at(curve: Sequence[Point], goal: float) -> float:
    return next((samples for samples, value in curve if value <= goal), math.inf)
