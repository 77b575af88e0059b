"""Small reproductions of the paper's ablations, on the real pair SmolLM2 135M -> Gemma 3 270M.

    python benchmarks/ablations.py                    every block; prints tables, writes results/ablations.json
    python benchmarks/ablations.py --only untrained   one block (may be given several times)
    python benchmarks/ablations.py --again            also the rows that are there already

Blocks, each the quickstart with its warm-up alone (projector only), validated on 64 images:

untrained  the first projector before any update: converter kinds, with and without calibration, against random
projector  the quickstart's converter against none, and against two that start lower: validated every 32 samples
rates      the quickstart's warm-up at 1x, 2x, 5x, 10x and 20x the recipe's fine-tuning rate, 5e-4, in its batches of
           4 (the paper warms up at 5x); the quickstart itself takes 4x; validated every 64 samples
warmup     batch size, rate and calibration, from which the quickstart's settings were chosen: every 32 samples

192 samples a row. Estimate on two idle cores: opening 15 s; 9 untrained rows of 5 s; 15 different trained rows of 29 s
for updates (one of 4 takes 0.6 s, a larger one less a sample) and 10 to 18 s for validations (2.5 s each): about 12
minutes. A row is stored with the hash of its recipe: one that is there is not run again, so that an interrupted run
goes on, and rows of two blocks with the same recipe are run once.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pair import QUICKSTART, Pair, Timeline, one_stage

from vpgtrans.recipe import Recipe, dump, load_recipe
from vpgtrans.references import resolve
from vpgtrans.runs.parts import flushed_denormals

RESULTS = Path(__file__).parent / "results" / "ablations.json"
FACTORS = (1, 2, 5, 10, 20)
TUNED = (
    (16, 5e-3, True),
    (8, 5e-3, True),
    (8, 1e-2, True),
    (8, 5e-3, False),
    (4, 2e-3, True),
    (4, 2e-3, False),
    (4, 1e-3, False),
)
"""Batch size, learning rate, calibrated."""

Blocks = dict[str, dict[str, Recipe]]
Curve = list[list[float]]


def normal_rate() -> float:
    """What 1x means: the rate at which the quickstart fine-tunes the projector."""
    return load_recipe(QUICKSTART).stages[-1].rates["projector"]


def blocks(samples: int, images: int) -> Blocks:
    """Block -> row -> recipe. samples: of a row; images: to validate on."""

    def variant(every: int = 32, *, initialiser: dict[str, Any] | None = None, **stage: Any) -> Recipe:
        keys = stage | {"budget": {"samples": samples}, "validate_every": every}
        changes = {} if initialiser is None else {"initialiser": initialiser}
        return one_stage(validate_samples=images, stage=keys, **changes)

    def converter(**values: Any) -> dict[str, Any]:
        return {"kind": "converter", **values}

    inherit, plain = {"kind": "inherit"}, {"calibrate": False}
    # No CCA without RMS match: into a wider space, as here, it is always matched.
    starts = {
        "random": inherit,
        "CCA .25, calibrated": converter(fit="cca"),
        "CCA .25": converter(fit="cca", **plain),
        "ridge, calibrated": converter(fit="ridge"),
        "ridge": converter(fit="ridge", **plain),
        "ridge, not RMS-matched": converter(fit="ridge", rms_match=False, **plain),
        "Procrustes, calibrated": converter(fit="procrustes"),
        "caption-fit, calibrated": {"kind": "caption-fit"},
        "caption-fit": {"kind": "caption-fit", **plain},
    }
    normal = normal_rate()
    return {
        "untrained": {label: variant(initialiser=start) for label, start in starts.items()},
        "projector": {
            "converter (CCA .25)": variant(),
            "none (random projector)": variant(initialiser=inherit),
            "converter (ridge, not RMS-matched)": variant(initialiser=starts["ridge, not RMS-matched"]),
            "caption-fit (on 96 training images)": variant(initialiser=starts["caption-fit"]),
        },
        "rates": {f"{factor}x ({normal * factor:g})": variant(64, lr=normal * factor) for factor in FACTORS},
        "warmup": {
            f"{size} @ {rate:g}, {'' if calibrated else 'not '}calibrated": variant(
                batch_size=size, lr=rate, initialiser=converter(fit="cca", alpha=0.25, calibrate=calibrated)
            )
            for size, rate, calibrated in TUNED
        },
    }


def run(pair: Pair, recipe: Recipe, *, train: bool) -> Curve:
    """[samples, validation loss] of a row, its zeroth point before any update; untrained, that point alone."""
    log = Timeline()
    stage_run = pair.stage_run(recipe, log)
    if not train:
        return [[0, stage_run.validator(stage_run.module)]]
    stage_run.run()
    return log.curve


def markdown(block: str, rows: dict[str, dict[str, Any]]) -> str:
    """A block's curves as a table; rows that are not there yet are left out."""
    places = sorted({point[0] for row in rows.values() for point in row["curve"]})
    lines = [f"| {block} | " + " | ".join(f"{int(place)}" for place in places) + " |", "|---" * (1 + len(places)) + "|"]
    for label, row in rows.items():
        losses = dict(row["curve"])
        cells = (f"{losses[place]:.2f}" if place in losses else "–" for place in places)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def key(recipe: Recipe) -> str:
    """Of a row's results: the recipe with all defaults, and the VPG that its source names at the moment."""
    assert isinstance(recipe.source.vpg, str)
    manifest = resolve(recipe.source.vpg).path / "manifest.json"
    return hashlib.sha256(dump(recipe).encode() + manifest.read_bytes()).hexdigest()[:16]


def known(found: dict[str, Any], digest: str, *, train: bool) -> Curve | None:
    """The curve of a recipe that has been run, in whichever block; a trained row's start is an untrained row."""
    for rows in found.values():
        for row in rows.values():
            if row["recipe"] == digest and (len(row["curve"]) > 1 or not train):
                return row["curve"] if train else row["curve"][:1]
    return None


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=["untrained", "projector", "rates", "warmup"])
    parser.add_argument("--again", action="store_true", help="run rows that are in the results already")
    parser.add_argument("--samples", type=int, default=192, help="of a trained row")
    parser.add_argument("--images", type=int, default=64, help="to validate on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    planned = blocks(args.samples, args.images)
    chosen = {name: rows for name, rows in planned.items() if args.only is None or name in args.only}
    stored: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    # Rows that no block names any more go; those that are to be run again are not found again.
    found = {name: {} if args.again and name in chosen else stored.get(name, {}) for name in planned}
    with flushed_denormals():
        pair: Pair | None = None
        for name, rows in chosen.items():
            train = name != "untrained"
            done: dict[str, Any] = {}
            for label, recipe in rows.items():
                digest = key(recipe)
                curve = known(found | {"": done}, digest, train=train)
                if curve is None:
                    # Opened with a converter, whatever the first row starts from: all rows share it.
                    pair = pair or Pair(load_recipe(QUICKSTART))
                    curve = run(pair, recipe, train=train)
                done[label] = {"recipe": digest, "curve": curve}
                partly = found[name] | done
                found[name] = {row: partly[row] for row in rows if row in partly}
                _write(args.output, found)
            print(markdown(name, found[name]) + "\n", flush=True)


def _write(path: Path, found: dict[str, Any]) -> None:
    """After each row: an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: rows for name, rows in found.items() if rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
