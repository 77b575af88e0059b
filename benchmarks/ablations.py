"""Small reproductions of the paper's ablations, on the real pair SmolLM2 135M -> Gemma 3 270M.

    python benchmarks/ablations.py              every block; prints tables, writes results/ablations.json
    python benchmarks/ablations.py --only untrained

Blocks: `untrained` (the composed projector before any update: converter kinds, with and without calibration, against
random), `projector` (converter against none, only the projector trains), `rates` (warm-up at 1x, 2x, 5x, 10x, 20x).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from vpgtrans.recipe import Recipe, load_recipe
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.runs.parts import open_mixture, open_source, pick_device
from vpgtrans.runs.start import begin, prepare
from vpgtrans.runs.training import run_stages

RESULTS = Path(__file__).parent / "results" / "ablations.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
NORMAL_RATE = 1e-3
"""What 1x means for the warm-up: the rate at which a projector of this size trains from scratch."""


def curve(recipe: Recipe) -> list[list[float]]:
    """[samples, validation loss] of a run, its zeroth point before any update."""
    source = open_source(recipe.source.vpg, seed=recipe.seed)
    train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    prepared = prepare(recipe, device=torch.device("cpu"), source=source, train=train)
    start = begin(recipe, prepared, validation)
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDirectory(Path(scratch))
        run_stages(
            start.vlm, recipe, run, train=train, validation=validation, resume=False, keep_checkpoints=False
        )  # fmt: skip
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [[line["samples"], line["val_loss"]] for line in lines if "val_loss" in line]


def variant(samples: int, **changes: Any) -> Recipe:
    """The quickstart with its warm-up alone, `samples` long, and the given overrides."""
    base = load_recipe(RECIPE)
    stages = [base.stages[0].model_dump(mode="json") | {"budget": {"samples": samples}, "validate_every": 64}]
    return load_recipe(RECIPE, {"stages": stages, **changes})


def blocks(samples: int) -> dict[str, dict[str, Recipe]]:
    def initialiser(**values: Any) -> dict[str, Any]:
        return {"initialiser": {"kind": "converter", **values}}

    rates = {
        f"warm-up at {factor}x ({NORMAL_RATE * factor:g})": variant(samples, **{"stages.0.lr": NORMAL_RATE * factor})
        for factor in (1, 2, 5, 10, 20)
    }
    return {
        "untrained": {
            "random": variant(16, initialiser="inherit"),
            "CCA .25": variant(16, **initialiser()),
            "CCA .25, not calibrated": variant(16, **initialiser(calibrate=False)),
            "CCA .25, neither calibrated nor RMS-matched": variant(16, **initialiser(calibrate=False, rms_match=False)),
            "ridge, not calibrated, not RMS-matched": variant(
                16, **initialiser(fit="ridge", calibrate=False, rms_match=False)
            ),
            "Procrustes": variant(16, **initialiser(fit="procrustes")),
            "caption-fit": variant(16, initialiser={"kind": "caption-fit"}),
        },
        "projector": {
            "converter": variant(samples),
            "none (random projector)": variant(samples, initialiser="inherit"),
        },
        "rates": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["untrained", "projector", "rates"])
    parser.add_argument("--samples", type=int, default=320)
    arguments = parser.parse_args()
    pick_device("cpu")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, recipes in blocks(arguments.samples).items():
        if arguments.only not in (None, name):
            continue
        found[name] = {}
        for label, recipe in recipes.items():
            points = curve(recipe)
            found[name][label] = points[:1] if name == "untrained" else points
            shown = "  ".join(f"{int(samples)}: {loss:.3f}" for samples, loss in found[name][label])
            print(f"{name:10} {label:45} {shown}", flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
