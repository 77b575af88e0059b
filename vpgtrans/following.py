"""A run as its directory shows it: what `vpgtrans watch` knows. Reads files alone; no torch, no rich."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from vpgtrans.errors import UserError
from vpgtrans.status import read_status, works

QUIET = 10.0
"""A run is stalled when it has said nothing for so many times as long as it usually takes between two lines …"""
LEAST_QUIET = 120.0
"""… but not before so many seconds."""
_PLACE = ("update", "samples", "seconds")
"""Of every line of the log."""


@dataclass
class StageView:
    """One stage, as far as it is known."""

    name: str
    updates: int | None = None
    """Of the whole stage; None until it begins."""
    done: int = 0
    samples: int = 0
    val_loss: float | None = None
    """Its best."""
    stopped_early: bool = False
    lr: Any = None
    skipped: int = 0


@dataclass
class RunView:
    """A run at one moment.

    Attributes:
        state: starting, running, stalled, evaluating, finished, interrupted, failed or killed.
        quiet: seconds since its last line. left, left_all: seconds to go in the stage, and in all stages.
        last: figures of the last update's line. train, validation: losses by samples.
    """

    path: str
    name: str
    state: str
    message: str = ""
    host: str | None = None
    pid: int | None = None
    stages: list[StageView] = field(default_factory=list)
    stage: str | None = None
    seconds: float | None = None
    quiet: float | None = None
    left: float | None = None
    left_all: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    train: list[tuple[float, float]] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    """Of a comparison, the arms that are done; the rest is of the one under way."""

    @property
    def over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ("finished", "interrupted", "failed", "killed")


def view(run: Path, *, now: float | None = None) -> RunView:
    """The run in a directory.

    Raises:
        UserError: there is none.
    """
    if not (run / "recipe.yaml").is_file() or not (run / "environment.json").is_file():
        raise UserError(f"{run}: there is no run here; give the directory that a run writes (runs/NAME)")
    now = time.time() if now is None else now
    recipe, said = _recipe(run), read_status(run)
    arms = sorted((run / "arms").glob("*/"), key=_changed) if (run / "arms").is_dir() else []
    shown = arms[-1] if arms else run
    lines = _lines(shown / "metrics.jsonl")
    found = RunView(str(run), str(recipe.get("name", run.name)), "starting")
    found.arms = [arm.name for arm in arms if (arm / "result.json").is_file()]
    found.host, found.pid, found.message = said.get("host"), said.get("pid"), said.get("message", "")
    _stages(found, recipe, lines, said, shown)
    _losses(found, lines)
    _checkpoint(found, run / "checkpoints", now)
    metrics = shown / "metrics.jsonl"
    if metrics.is_file():
        found.quiet = max(0.0, now - _changed(metrics))
    found.state = _state(found, run, said, lines, now)
    if not found.over:
        _time_left(found, lines, recipe)
    return found


def _state(found: RunView, run: Path, said: dict[str, Any], lines: Sequence[dict[str, Any]], now: float) -> str:
    if said.get("state") in ("finished", "interrupted", "failed"):
        return str(said["state"])
    if not said:  # of a version that wrote none
        return "finished" if (run / "summary.json").is_file() else "unknown"
    if not works(said, now=now):
        return "killed"
    if not lines:
        return "starting"
    stages = found.stages
    if all(stage.updates is not None and (stage.done >= stage.updates or stage.stopped_early) for stage in stages):
        return "evaluating"
    quiet = found.quiet or 0.0
    return "stalled" if quiet > max(LEAST_QUIET, QUIET * _usual(lines)) else "running"


def _usual(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds between two lines, of the slower ones: a validation's among them."""
    times = [float(line["seconds"]) for line in lines[-50:]]
    gaps = sorted(b - a for a, b in pairwise(times) if b >= a)
    return gaps[int(0.9 * (len(gaps) - 1))] if gaps else 0.0


def _stages(
    found: RunView, recipe: dict[str, Any], lines: Sequence[dict[str, Any]], said: dict[str, Any], run: Path
) -> None:
    names = list(_budgets(recipe))
    names = [*names, *dict.fromkeys(line["stage"] for line in lines if line["stage"] not in names)]
    if run.name != Path(found.path).name:  # an arm may have fewer
        names = [name for name in names if any(line["stage"] == name for line in lines)]
    lengths = {name: count for name, count in said.get("updates", {}).items() if isinstance(count, int)}
    summary = _object(run / "summary.json").get("stages")
    finished = {
        stage["name"]
        for stage in (summary if isinstance(summary, list) else [])
        if isinstance(stage, dict) and isinstance(stage.get("name"), str)
    }
    rates = {str(row.get("stage")): row["lr"] for row in _rows(run / "trainable.json") if row.get("lr") is not None}
    for name in names:
        own = [line for line in lines if line["stage"] == name]
        losses = [line["val_loss"] for line in own if _number(line.get("val_loss"))]
        stage = StageView(name, lengths.get(name), max((line["update"] for line in own), default=0))
        stage.samples = own[-1]["samples"] - own[0]["samples"] if own else 0
        stage.val_loss = min(losses, default=None)
        stage.skipped = sum("skipped" in line for line in own)
        stage.lr = rates.get(name)
        over = name in finished or (own and lines[-1]["stage"] != name)
        if over:
            stage.stopped_early = stage.updates is not None and stage.done < stage.updates
            stage.updates = stage.updates if stage.stopped_early else stage.done
        found.stages.append(stage)
    found.stage = lines[-1]["stage"] if lines else None


def _losses(found: RunView, lines: Sequence[dict[str, Any]]) -> None:
    for line in lines:
        if _number(line.get("val_loss")):
            found.validation.append((line["samples"], line["val_loss"]))
        elif _number(line.get("loss")):
            found.train.append((line["samples"], line["loss"]))
            found.last = {
                key: value for key, value in line.items() if value is None or _number(value) or key == "stage"
            }
        elif "skipped" in line:
            found.skipped.append({key: line.get(key) for key in ("stage", "update", "skipped", "ids")})
    found.seconds = lines[-1]["seconds"] if lines else None


def _time_left(found: RunView, lines: Sequence[dict[str, Any]], recipe: dict[str, Any]) -> None:
    """By the pace of the stage under way, its validations included; later stages are taken to go at the same pace."""
    stage = next((stage for stage in found.stages if stage.name == found.stage), None)
    own = [line for line in lines if stage is not None and line["stage"] == stage.name]
    if stage is None or stage.updates is None or len(own) < 2 or not (stage.samples and stage.done):
        return
    took = own[-1]["seconds"] - own[0]["seconds"]
    if took <= 0:
        return
    found.left = took / stage.done * (stage.updates - stage.done)
    budgets = _budgets(recipe)
    later = [budgets.get(each.name) for each in found.stages[found.stages.index(stage) + 1 :]]
    samples = [budget for budget in later if budget is not None]
    if len(samples) == len(later):
        found.left_all = found.left + took / stage.samples * sum(samples)


def _checkpoint(found: RunView, directory: Path, now: float) -> None:
    there = sorted(path for path in directory.glob("[0-9]*-[0-9]*") if (path / "manifest.json").is_file())
    if there:
        found.checkpoint, found.checkpoint_age = there[-1].name, max(0.0, now - _changed(there[-1] / "manifest.json"))


def _recipe(run: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        recipe = YAML(typ="safe", pure=True).load((run / "recipe.yaml").read_text())
    except (OSError, ValueError, YAMLError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _budgets(recipe: dict[str, Any]) -> dict[str, float | None]:
    """Name -> samples of every stage; None where it is counted otherwise."""
    stages, found = recipe.get("stages"), {}
    for stage in stages if isinstance(stages, list) else []:
        if isinstance(stage, dict) and isinstance(stage.get("name"), str):
            budget = stage.get("budget")
            samples = budget.get("samples") if isinstance(budget, dict) else None
            found[stage["name"]] = samples if _number(samples) else None
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines; the last one may be half written, and any may be damaged."""
    found = []
    try:
        texts = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if (
            isinstance(line, dict)
            and isinstance(line.get("stage"), str)
            and all(_number(line.get(key)) for key in _PLACE)
        ):
            found.append(line)
    return found


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve(points: Sequence[tuple[float, float]], width: int) -> list[float]:
    """Medians of the values in `width` stretches of equal numbers of points, fewer where there are fewer points."""
    values = [value for _, value in points if _number(value)]
    size = max(1.0, len(values) / width)
    cuts = [round(place * size) for place in range(min(width, len(values)) + 1)]
    return [median(values[a:b]) for a, b in pairwise(cuts) if b > a]
