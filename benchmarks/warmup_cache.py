"""What the feature cache saves: samples a second with it and without, on the real pair, and why.

    python benchmarks/warmup_cache.py                          # about 4 minutes on two idle cores
    python benchmarks/warmup_cache.py --samples 8 --rounds 1   # to try it

Two settings of the same VPG and LLM (SmolLM2's VPG -> Gemma 3 270M):

warmup  the quickstart's warm-up: the projector trains, the LLM runs forward and backward; cached are visual tokens
words   the first stage of recipes/openmoji-source.yaml: connector and projector train on `losses: {words: 1.0}`, the
        LLM never runs; cached are the encoder's patches; four times as many samples

Rounds alternate (cached, not cached, cached, …) over the same samples in the same order from the same projector;
rates are medians over rounds and of training alone, without validation. The cache is filled into a new directory, so
that its cost is seen; the user's own caches stay as they are. Run it on an idle machine: it measures wall seconds.
Writes benchmarks/results/warmup_cache.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pair import Pair, Timeline, one_stage

from vpgtrans.recipe import Recipe
from vpgtrans.runs.parts import flushed_denormals
from vpgtrans.training.fit import StageRun

RESULTS = Path(__file__).parent / "results" / "warmup_cache.json"
WARMUP: dict[str, Any] = {}
"""The quickstart's own warm-up."""
WORDS: dict[str, Any] = {
    "name": "words",
    "trainable": {"connector": "full", "projector": "full"},
    "losses": {"words": 1.0},
    "lr": 1e-3,
    "batch_size": 32,
}
SETTINGS = {"warmup": WARMUP, "words": WORDS}
WORDS_SAMPLES = 4
"""Samples of `words` for each one of `warmup`: its updates are larger and far cheaper."""
PIECES = ("decode", "preprocess", "encoder", "connector", "llm_forward", "backward")
"""`connector` is its forward pass; what is left of an update (loss, optimizer, log) is `rest`."""


@dataclass
class Round:
    """Training seconds of one round, and where they went."""

    cached: bool
    updates: int
    samples: int
    seconds: float
    pieces: dict[str, float]
    """Seconds in each of PIECES, and in the rest."""
    losses: list[float]


class Clock(Timeline):
    """A log that also notes, with every line, the seconds so far in each piece."""

    def __init__(self) -> None:
        super().__init__()
        self.spent = dict.fromkeys(PIECES, 0.0)

    def write(self, **figures: Any) -> None:
        super().write(**figures, spent=dict(self.spent))

    def timed(self, piece: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its seconds added to a piece."""

        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[piece] += time.perf_counter() - start

        return call

    @contextmanager
    def watching(self, run: StageRun) -> Iterator[None]:
        """Within the block the run's parts are timed."""
        vlm, module = run.vlm, run.module
        watched: list[tuple[Any, str, str]] = [
            (vlm.vpg.transform, "pieces", "preprocess"),
            (vlm.vpg.encoder, "forward", "encoder"),
            (vlm.vpg.connector, "forward", "connector"),
            (vlm.llm.model, "forward", "llm_forward"),
            (module, "manual_backward", "backward"),
        ]
        watched += [(source, "open", "decode") for source in run.data.samples.mixture.sources]
        with ExitStack() as stack:
            for owner, name, piece in watched:
                stack.enter_context(patch.object(owner, name, self.timed(piece, getattr(owner, name))))
            yield

    def training(self) -> tuple[float, dict[str, float]]:
        """Seconds of the updates alone, and of the pieces in them: from the line before each update to its own."""
        seconds, pieces = 0.0, dict.fromkeys(PIECES, 0.0)
        for before, line in pairwise(self.lines):
            if "val_loss" in line:
                continue
            seconds += line["seconds"] - before["seconds"]
            for piece in PIECES:
                pieces[piece] += line["spent"][piece] - before["spent"][piece]
        return seconds, pieces | {"rest": seconds - sum(pieces.values())}


def play(pair: Pair, recipe: Recipe, *, features: Path) -> Round:
    """One round."""
    clock = Clock()
    run = pair.stage_run(recipe, clock, features=features)
    assert run.updates <= 400, "the log would not hold every update"
    with clock.watching(run):
        result = run.run()
    seconds, pieces = clock.training()
    losses = [line["loss"] for line in clock.lines if "loss" in line]
    cached = recipe.stages[0].cache_features is not False
    return Round(cached, result.updates, result.samples, seconds, pieces, losses)


def fill(pair: Pair, recipe: Recipe, *, features: Path) -> dict[str, Any]:
    """What preparing the stage's images costs with an empty cache: the bill that is paid once."""
    run = pair.stage_run(recipe, Timeline(), features=features)
    distinct = np.unique(pair.train.draws(recipe.seed, 0, run.updates * run.stage.batch_size))
    images = len(distinct) + len(run.validator.rows)
    samples = run.data.samples
    row = samples.fetch([int(distinct[0])]).inputs
    return {
        "level": samples.front.level,
        "images": images,
        "seconds": run.preparation_seconds,
        "seconds_per_image": run.preparation_seconds / images,
        "bytes_per_image": row.numel() * row.element_size(),
    }


def measure(pair: Pair, recipes: dict[bool, Recipe], *, rounds: int) -> dict[str, Any]:
    """Both ways in turns. recipes: cached or not -> the same recipe with `cache_features` so."""
    with tempfile.TemporaryDirectory() as scratch:
        features = Path(scratch)
        stage = recipes[False].stages[0]
        short = stage.model_copy(update={"budget": stage.budget.model_copy(update={"samples": stage.batch_size})})
        play(pair, recipes[False].model_copy(update={"stages": [short]}), features=features)  # nothing is first then
        filled = fill(pair, recipes[True], features=features)
        played = [play(pair, recipes[cached], features=features) for _ in range(rounds) for cached in (True, False)]
    return summarise(played, filled, batch_size=stage.batch_size)


def summarise(played: list[Round], filled: dict[str, Any], *, batch_size: int) -> dict[str, Any]:
    """Rates, their ratio, where an update's seconds go, and when the cache has paid for itself."""
    sides: dict[str, Any] = {}
    for name, cached in (("cached", True), ("not_cached", False)):
        own = [entry for entry in played if entry.cached == cached]
        pieces = {piece: median(entry.pieces[piece] / entry.updates for entry in own) for piece in own[0].pieces}
        sides[name] = {
            "samples_per_second": median(entry.samples / entry.seconds for entry in own),
            "seconds_per_update": median(entry.seconds / entry.updates for entry in own),
            "pieces_per_update": pieces,
        }
    slow, fast = sides["not_cached"]["seconds_per_update"], sides["cached"]["seconds_per_update"]
    front = _front(sides["not_cached"]["pieces_per_update"]) - _front(sides["cached"]["pieces_per_update"])
    saved = (slow - fast) / batch_size
    first = {entry.cached: entry.losses for entry in reversed(played)}
    return {
        "batch_size": batch_size,
        **sides,
        "ratio": sides["cached"]["samples_per_second"] / sides["not_cached"]["samples_per_second"],
        "front_seconds_per_update": front,
        "front_share": front / slow,
        "fill": filled,
        "saved_seconds_per_image_and_pass": saved,
        # Noise can make the saving vanish in a short trial.
        "passes_to_pay": filled["seconds_per_image"] / saved if saved > 0 else None,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(first[True], first[False], strict=True)),
        "rounds": [asdict(entry) for entry in played],
    }


def _front(pieces: dict[str, float]) -> float:
    """Seconds from the file to what would be cached; a connector that trains cancels out against the cached side."""
    return sum(pieces[piece] for piece in ("decode", "preprocess", "encoder", "connector"))


def table(name: str, found: dict[str, Any]) -> str:
    """A setting as a markdown table, and its why in words."""
    cached, plain, filled = found["cached"], found["not_cached"], found["fill"]
    lines = [f"| {name}, batches of {found['batch_size']} | cached | not cached |", "|---|---|---|"]
    rates = f"{cached['samples_per_second']:.1f} | {plain['samples_per_second']:.1f}"
    lines.append(f"| **samples a second** | {rates} |")
    lines.append(f"| seconds an update | {cached['seconds_per_update']:.3f} | {plain['seconds_per_update']:.3f} |")
    for piece in (*PIECES, "rest"):
        pair = f"{cached['pieces_per_update'][piece]:.3f} | {plain['pieces_per_update'][piece]:.3f}"
        lines.append(f"| … {piece.replace('_', ' ')} | {pair} |")
    passes = found["passes_to_pay"]
    paid = "no saving was measured" if passes is None else f"paid back after {passes:.2f} passes over an image"
    return "\n".join(lines) + (
        f"\nratio {found['ratio']:.2f}: the front takes {100 * found['front_share']:.0f} % of an uncached update, and "
        f"the cache removes that alone\nfilling: {filled['images']} images in {filled['seconds']:.1f} s, "
        f"{1000 * filled['seconds_per_image']:.1f} ms and {filled['bytes_per_image']:,} bytes ({filled['level']}) "
        f"each; {paid}\nlargest difference of a training loss: {found['largest_loss_difference']:.1e}"
    )


def settings(samples: int) -> dict[str, dict[bool, Recipe]]:
    """Setting -> cached or not -> recipe. Validation, which the runner insists on, takes one image."""
    budgets = {"warmup": samples, "words": WORDS_SAMPLES * samples}
    return {
        name: {
            cached: one_stage(
                validate_samples=1,
                stage=stage
                | {"budget": {"samples": budgets[name]}, "cache_features": cached, "augment": False}
                | {"validate_every": budgets[name]},
            )
            for cached in (True, False)
        }
        for name, stage in SETTINGS.items()
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="a round of the warm-up")
    parser.add_argument("--rounds", type=int, default=3, help="of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "command": f"python benchmarks/warmup_cache.py --samples {args.samples} --rounds {args.rounds}",
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "load_before": os.getloadavg()[0],
    }
    with flushed_denormals():
        planned = settings(args.samples)
        pair = Pair(planned["warmup"][True])
        for name, recipes in planned.items():
            report[name] = measure(pair, recipes, rounds=args.rounds)
            print(table(name, report[name]) + "\n", flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
