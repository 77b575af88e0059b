"""Few visual tokens first and many later, against many throughout: seconds until the same validation loss.

    python benchmarks/low_to_high.py                  both arms; prints a table, writes results/low_to_high.json
    python benchmarks/low_to_high.py --seeds 3        more seeds, one after the other

EfficientNet-Lite0 at 192 pixels, its maps of 12 x 12 places, a pool connector and SmolLM2 135M, trained from scratch on
the quickstart's data: 144 visual tokens an image, or 16 first. high: all samples at 144 tokens. low to high: a first
stage at 16 tokens, then the same stage as high's, for at most as many samples. The learning rate is constant and
nothing is cached (what one arm computed would serve the other), so that a second is worth the same in both.

What counts is the loss on held-out images at 144 tokens: its goal is the one that high ends with, and an arm is there
at the first validation that is not above it. Seconds are the run's own, validations and both stages included.

Captions are not good after so few samples. Estimate on two idle cores: 32 updates of 16 images at 144 tokens take 3
minutes, 24 at 16 tokens half a minute, nine validations of 48 images one; both arms 10 minutes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from vpgtrans import runs
from vpgtrans.recipe import Recipe, load_recipe

SOURCE = Path(__file__).parents[1] / "recipes" / "openmoji-source.yaml"
RESULTS = Path(__file__).parent / "results" / "low_to_high.json"
LOW, HIGH = 16, 144
ARMS = ("high", "low to high")

Line = dict[str, Any]
"""Of a run's log: stage, samples, seconds, val_loss."""


def arm(name: str, *, samples: int, low: int, every: int, images: int, seed: int) -> Recipe:
    """The source's recipe with other parts and stages. low: samples of the first stage of `low to high`."""
    stage = {
        "trainable": {"connector": "full", "projector": "full"},
        "lr": 1e-3,
        "lr_schedule": "constant",
        "batch_size": 16,
        "cache_features": False,
        "validate_every": every,
    }
    stages = [
        stage | {"name": "low", "visual_tokens": LOW, "budget": {"samples": low}},
        stage | {"name": "high", "visual_tokens": HIGH, "budget": {"samples": samples}},
    ]
    changes = {
        "name": name.replace(" ", "-"),
        "source.vpg.encoder.levels": [10, 15],
        "source.vpg.encoder.fold": 1,
        "source.vpg.connector": {"kind": "pool", "tokens": HIGH, "width": 512, "standardised": True},
        "data.augment": None,
        "stages": stages[1:] if name == "high" else stages,
        "trainer.validate_samples": images,
        "evaluation": {"samples": 1, "max_new_tokens": 1},
        "seed": seed,
    }
    return load_recipe(SOURCE, changes)


def validations(run: Path) -> list[Line]:
    """What a run measured, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("stage", "samples", "seconds", "val_loss")
    return [{key: line[key] for key in keys} for line in lines if "val_loss" in line]


def reached(lines: list[Line], goal: float) -> Line | None:
    """The first validation at many tokens that is not above the goal."""
    return next((line for line in lines if line["stage"] == "high" and line["val_loss"] <= goal), None)


def compare(lines: dict[str, list[Line]]) -> dict[str, Any]:
    """Of both arms, when the loss that `high` ends with was reached."""
    goal = lines["high"][-1]["val_loss"]
    found: dict[str, Any] = {"goal": goal, "arms": {}}
    for name in ARMS:
        there = reached(lines[name], goal)
        found["arms"][name] = {
            "seconds": None if there is None else there["seconds"],
            "samples": None if there is None else there["samples"],
            "final": lines[name][-1]["val_loss"],
            "lines": lines[name],
        }
    high, other = (found["arms"][name]["seconds"] for name in ARMS)
    found["times_sooner"] = None if other is None else high / other
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A row an arm and seed."""
    rows = ["| seed | arm | goal | seconds to it | samples to it | at the end |", "|---|---|---|---|---|---|"]
    for seed, figures in enumerate(found):
        for name, own in figures["arms"].items():
            there = ["–", "–"] if own["seconds"] is None else [f"{own['seconds']:.1f}", f"{own['samples']:,}"]
            rows.append(f"| {seed} | {name} | {figures['goal']:.3f} | {' | '.join(there)} | {own['final']:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help="at many tokens")
    parser.add_argument("--low", type=int, default=384, help="samples of the first stage, at few tokens")
    parser.add_argument("--every", type=int, default=64, help="samples between validations")
    parser.add_argument("--images", type=int, default=48, help="to validate on")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    chosen = {key: getattr(arguments, key) for key in ("samples", "low", "every", "images")}
    found = []
    for seed in range(arguments.seeds):
        lines = {}
        for name in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                run = runs.train(arm(name, **chosen, seed=seed), output=Path(folder) / "run", device="cpu")
                lines[name] = validations(run)
        found.append(compare(lines))
        arguments.output.write_text(json.dumps({"settings": chosen, "seeds": found}, indent=2) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
