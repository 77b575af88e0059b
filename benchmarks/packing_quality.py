"""Does packing change what is learnt, and how much time does it save? The quickstart, packed and padded.

    python benchmarks/packing_quality.py [--seeds 3] [--tokens 6000] [--output results/packing_quality.json]

Both arms of a seed train on the same number of target tokens, one after the other (which comes first alternates), and
are validated on the same samples. Seconds are those of the fine-tune with its validations, without what fills caches.
A run that is there is taken as it is, so that what was interrupted goes on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import vpgtrans

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "packing_quality.json"
ARMS: dict[str, Any] = {"padded": None, "packed": {"max_tokens": 512}}


def measure(arm: str, seed: int, tokens: int, runs: Path) -> dict[str, float]:
    """One run of the quickstart: validation losses, seconds and peak memory of its fine-tune."""
    run = runs / f"{arm}-{seed}"
    if not (run / "summary.json").is_file():
        changes = {
            "seed": seed,
            "data.packing": ARMS[arm],
            "stages.finetune.budget": {"tokens": tokens},
            "stages.finetune.validate_every": 1 << 20,  # at the beginning and the end
            "evaluation.samples": 8,
        }
        vpgtrans.transfer(ROOT.parent / "recipes" / "quickstart.yaml", changes, output=run, overwrite=True)
    stage = json.loads((run / "summary.json").read_text())["stages"][-1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["stage"] == stage["name"]]
    losses = [line["val_loss"] for line in own if "val_loss" in line]
    return {
        "val_loss": losses[-1],
        "target_tokens": own[-1]["text_tokens"] - own[0]["text_tokens"],
        "samples": stage["samples"],
        "updates": stage["updates"],
        "seconds": own[-1]["seconds"] - own[0]["seconds"],
        "peak_memory_bytes": stage["peak_memory_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--runs", type=Path, default=Path("runs/packing_quality"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(arguments.seeds):
        for arm in list(ARMS) if seed % 2 == 0 else list(ARMS)[::-1]:
            found[arm].append(measure(arm, seed, arguments.tokens, arguments.runs))
    pairs = list(zip(found["padded"], found["packed"], strict=True))
    ratios = [
        (padded["seconds"] / padded["target_tokens"]) / (packed["seconds"] / packed["target_tokens"])
        for padded, packed in pairs
    ]
    differences = [packed["val_loss"] - padded["val_loss"] for padded, packed in pairs]
    result = {
        "arms": found,
        "faster": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "val_loss_differences": differences,
        "tokens": arguments.tokens,
    }
    print("| arm | validation loss, each seed | mean | target tokens | samples | updates |\n|---|---|---|---|---|---|")
    for arm, rows in found.items():
        losses = [row["val_loss"] for row in rows]
        counts = [f"{statistics.mean(row[key] for row in rows):.0f}" for key in ("target_tokens", "samples", "updates")]
        print(f"| {arm} | {', '.join(f'{loss:.3f}' for loss in losses)} | {statistics.mean(losses):.3f} | " +
              " | ".join(counts) + " |")  # fmt: skip
    print(f"\npacked is {statistics.median(ratios):.2f} [{min(ratios):.2f} - {max(ratios):.2f}] times as fast a token")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
