"""Does the range test of `lr: auto` pick a good warm-up rate? The real pair SmolLM2 135M -> Gemma 3 270M.

    python benchmarks/lr_range.py                 both parts; prints them, writes results/lr_range.json
    python benchmarks/lr_range.py --seeds 1       fewer warm-ups

1. The range test before the quickstart's warm-up (projector only, batches of 4): its curve, the rate, what it cost.
2. That warm-up at a grid of rates and at the picked one, 96 samples, validated on 64 images every 32 samples. The
   quickstart's own warm-up is the first 32 of them. Each seed has another order of the data.

A rate is within noise of the best where their means over seeds differ by less than twice the standard error of the
difference, over all rates and seeds. Finished rows are read back, so that an interrupted benchmark goes on. About 30 s
a warm-up on two idle cores.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from pair import Pair, Timeline, one_stage

from vpgtrans.recipe import Recipe
from vpgtrans.runs.parts import flushed_denormals
from vpgtrans.training.rates import pick, pick_rate, smooth

RESULTS = Path(__file__).parent / "results" / "lr_range.json"
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 1e-2)
SAMPLES = 96
BUDGETS = (32, SAMPLES)
"""Samples after which warm-ups are compared: the quickstart's, and a longer one."""


def recipe(rate: float | str, *, seed: int, samples: int = SAMPLES, images: int = 64) -> Recipe:
    """The quickstart's warm-up alone at a rate."""
    stage = {"lr": rate, "budget": {"samples": samples}, "validate_every": 32}
    return one_stage(validate_samples=images, stage=stage, seed=seed)


def warm_up(pair: Pair, rate: float, *, seed: int) -> dict[str, Any]:
    """Validation losses by samples of one warm-up."""
    log, started = Timeline(), time.perf_counter()
    pair.stage_run(recipe(rate, seed=seed), log).run()
    return {"rate": rate, "seed": seed, "curve": log.curve, "seconds": round(time.perf_counter() - started, 1)}


def at(curve: list[list[float]], samples: int) -> float:
    """The validation loss at so many samples, or at the nearest number that was validated: packs hold some more."""
    return min(curve, key=lambda point: abs(point[0] - samples))[1]


def verdict(rows: list[dict[str, Any]], picked: float, samples: int) -> dict[str, Any]:
    """Mean losses by rate, the best, and how far the picked rate is from it in noise."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(row["rate"], []).append(at(row["curve"], samples))
    means = {rate: fmean(found) for rate, found in losses.items()}
    best = min(means, key=means.__getitem__)
    several = [found for found in losses.values() if len(found) > 1]
    noise = math.sqrt(fmean(stdev(found) ** 2 for found in several)) if several else math.nan
    error = noise * math.sqrt(2 / min(len(found) for found in losses.values()))
    return {
        "samples": samples,
        "losses": {f"{rate:g}": [round(loss, 4) for loss in losses[rate]] for rate in sorted(losses)},
        "best": best,
        "picked": picked,
        "behind": round(means[picked] - means[best], 4),
        "two_standard_errors": round(2 * error, 4),
        "within_noise": means[picked] - means[best] <= 2 * error,
    }


@flushed_denormals()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only-test", action="store_true", help="the range tests, no warm-ups")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"tests": [], "warm_ups": []}

    def keep() -> None:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")

    pair = Pair(recipe("auto", seed=0))
    start = recipe("auto", seed=0).initialiser
    for seed in range(arguments.seeds):
        if any(test["seed"] == seed for test in document["tests"]):
            continue
        found = asdict(pick_rate(pair.stage_run(recipe("auto", seed=seed), Timeline())))
        document["tests"].append({"seed": seed, "initialiser": start.kind, **found})
        keep()
    for test in document["tests"]:
        test["rate"] = pick(test["rates"], test["gains"])  # by the rule as it is now
        cost = f"{test['samples']} samples, {test['seconds']:.0f} s"
        print(f"\nrange test, seed {test['seed']}: {test['rate']:g}; it took {cost}")
        for rate, gain, mean in zip(test["rates"], test["gains"], smooth(test["gains"]), strict=True):
            print(f"  {rate:9.2e} {gain:8.3f} {mean:8.3f}")
    if arguments.only_test:
        return
    picked = document["tests"][0]["rate"]
    for seed in range(arguments.seeds):
        for rate in sorted({*GRID, picked}):
            if not any((row["rate"], row["seed"]) == (rate, seed) for row in document["warm_ups"]):
                document["warm_ups"].append(warm_up(pair, rate, seed=seed))
                keep()
    document["verdicts"] = [verdict(document["warm_ups"], picked, samples) for samples in BUDGETS]
    keep()
    for said in document["verdicts"]:
        print(f"\nvalidation loss after {said['samples']} samples")
        for rate, losses in said["losses"].items():
            marks = [name for name in ("best", "picked") if f"{said[name]:g}" == rate]
            print(f"  {rate:>8} {fmean(losses):.4f}  {losses} {', '.join(marks)}")
        print(f"  behind the best by {said['behind']:.4f}; two standard errors are {said['two_standard_errors']:.4f}")


if __name__ == "__main__":
    main()
