"""Every connector from scratch at one budget: the quickstart's images, EfficientNet-Lite0 before it, SmolLM2 behind it.

    python benchmarks/connectors.py                     every row; prints the table, writes results/connectors.json
    python benchmarks/connectors.py --only pool merge   some rows
    python benchmarks/connectors.py --seeds 2           two seeds each
    python benchmarks/connectors.py --table             the table from the results, nothing is run

Each row is recipes/openmoji-source.yaml with another connector, the same number of samples in its two stages (words,
then captions), one view of each image, and validation on 96 images. The encoder's 36 patches of an image are computed
once and cached, for the row `concat` once more. FLOPs are counted (torch.utils.flop_counter) on one image's patches,
through connector and projector; a multiplication with its addition counts as two.

Estimate on two idle cores, for 3,200 + 384 samples: 1.5 minutes a row and seed, and 2 minutes for the two caches: 15
minutes for one seed. A row is stored with the hash of its recipe: one that is there is not run again, so that an
interrupted run goes on, and more seeds can be added.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpgtrans import runs
from vpgtrans.recipe import Recipe, load_recipe, recipe_hash
from vpgtrans.vlm_directory import load_vision

RESULTS = Path(__file__).parent / "results" / "connectors.json"
SOURCE = Path(__file__).parents[1] / "recipes" / "openmoji-source.yaml"

ATTENDING = {"width": 256, "heads": 8}
CONNECTORS: dict[str, dict[str, Any]] = {
    "qformer": {"queries": 12, "layers": 3, "hidden": 1024, "positions": True, **ATTENDING},
    "resampler": {"queries": 12, "layers": 2, "hidden": 1024, "positions": True, **ATTENDING},
    "cross-attention": {"queries": 12, **ATTENDING},
    "identity": {},
    "merge": {"window": [1, 3], "width": 256},
    "pixel-shuffle": {"factor": 2},
    "pool": {"tokens": 9, "width": 256},
    "pooled-queries": {"tokens": 9, "hidden": 1024, **ATTENDING},
}
"""Kind -> its keys, for 6 x 6 patches. All standardise what comes in: the encoder's maps differ in scale."""
CONCAT = "concat"
"""The Q-Former over two encoders side by side. No other one comes with a distribution, so both are EfficientNet-Lite0:
one gives its head and last block, one its blocks 10, 4 and 0, from 12 x 12 places averaged to the first one's 6 x 6."""


def recipes(*, words: int, captions: int, images: int, seed: int) -> dict[str, Recipe]:
    """Row -> recipe. words, captions: samples of the two stages; images: to validate on."""
    common: dict[str, Any] = {
        "seed": seed,
        "data.augment": None,
        "stages.words.budget.samples": words,
        "stages.words.validate_every": words,
        "stages.captions.budget.samples": captions,
        "stages.captions.validate_every": captions,
        "trainer.validate_samples": images,
        "evaluation": {"samples": 1, "max_new_tokens": 1},
    }
    rows = {kind: {"kind": kind, "standardised": True} | keys for kind, keys in CONNECTORS.items()}
    found = {
        kind: load_recipe(SOURCE, common | {"name": kind, "source.vpg.connector": keys}) for kind, keys in rows.items()
    }
    whole = found["qformer"].source.vpg.model_dump(mode="json")["encoder"]  # type: ignore[union-attr]
    both = [whole | {"levels": levels, "fold": 1} for levels in ([-1, 15], [10, 4, 0])]
    beside = {"source.vpg.encoder": {"kind": "concat", "encoders": both}, "source.vpg.connector": rows["qformer"]}
    return found | {CONCAT: load_recipe(SOURCE, common | {"name": CONCAT} | beside)}


def flops(module: nn.Module, inputs: torch.Tensor) -> int:
    """Of a forward pass, two for each multiplication with its addition."""
    counter = FlopCounterMode(display=False)
    # Fused attention kernels of a CPU are not counted; with gradients attention takes the path that is.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        module(inputs)
    return counter.get_total_flops()


def measure(recipe: Recipe) -> dict[str, Any]:
    """Train a row; its tokens, parameters and FLOPs an image, and the validation loss after the last stage."""
    with tempfile.TemporaryDirectory() as temporary:
        run = runs.train(recipe, output=Path(temporary) / "run")
        vision, summary = load_vision(str(run), encoder_weights=False), json.loads((run / "summary.json").read_text())
    vpg = vision.vpg
    after = nn.Sequential(vpg.connector, vision.projector).requires_grad_(True)
    return {
        "recipe": recipe_hash(recipe),
        "samples": [stage["samples"] for stage in summary["stages"]],
        "tokens": vpg.tokens,
        "width": vpg.width,
        "parameters": sum(parameter.numel() for parameter in after.parameters()),
        "flops": flops(after, torch.zeros(1, vpg.connector.patches, vpg.connector.width_in)),
        "val_loss": summary["val_loss"],
        "words_val_loss": summary["stages"][0]["val_loss"],
        "seconds": summary["seconds"],
    }


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Row -> seed -> figures, as the table of docs/connectors.md."""
    lines = ["| connector | tokens | parameters | MFLOPs | validation loss |", "|---|---|---|---|---|"]
    for row, seeds in found.items():
        first, losses = next(iter(seeds.values())), [figures["val_loss"] for figures in seeds.values()]
        spread = f" [{min(losses):.2f} - {max(losses):.2f}]" if len(losses) > 1 else ""
        size, cost = first["parameters"] / 1e6, first["flops"] / 1e6
        lines.append(f"| `{row}` | {first['tokens']} | {size:.2f} M | {cost:.0f} | {mean(losses):.2f}{spread} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*CONNECTORS, CONCAT], default=[*CONNECTORS, CONCAT])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--words", type=int, default=3200, help="samples of the first stage, which needs no LLM")
    parser.add_argument("--captions", type=int, default=384, help="samples of the second stage")
    parser.add_argument("--images", type=int, default=96, help="to validate on")
    parser.add_argument("--table", action="store_true", help="print what is there and run nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in range(0 if args.table else args.seeds):
        planned = recipes(words=args.words, captions=args.captions, images=args.images, seed=seed)
        for row in args.only:
            seeds = found.setdefault(row, {})
            if seeds.get(str(seed), {}).get("recipe") != recipe_hash(planned[row]):
                seeds[str(seed)] = measure(planned[row])
                found = {name: found[name] for name in planned if name in found}
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
