"""What the source VPG reads right, by what a held-out image tests.

    python benchmarks/source_vpg.py [VLM] [--output results/source_vpg.json]

combination: a base with another gender, hour or colour than in training. tone: a combination that training has, in
another skin tone. words: a new name made of known words. unseen: a name that shares nothing with training. exact_match:
share of captions that are right as a whole; name: apart from skin tones; tone: the skin tones alone, where there are
some.
"""

import argparse
import json
from pathlib import Path

import pyarrow.parquet as pq

import vpgtrans as vt
from vpgtrans.data.openmoji import build_openmoji
from vpgtrans.evaluation.metrics import match_parts, score
from vpgtrans.vision.preprocess import open_image

RESULTS = Path(__file__).parent / "results" / "source_vpg.json"
SPLITS = ("validation", "test", "test-unseen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vlm", nargs="?", default="registry:openmoji-qformer-smollm2-135m")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    vlm = vt.load(arguments.vlm)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for split in SPLITS:
        rows = pq.read_table(build_openmoji() / f"{split}.parquet", columns=["image", "caption", "tests"]).to_pylist()
        written: list[str] = []
        for start in range(0, len(rows), 32):
            images = [open_image(row["image"]) for row in rows[start : start + 32]]
            written += [text.strip() for text in vlm.generate(images, max_new_tokens=24)]
        found[split] = by_kind([row["tests"] for row in rows], [row["caption"] for row in rows], written)
        print(split)
        for kind, figures in found[split].items():
            print(f"  {kind:12}", "  ".join(f"{key} {_shown(value)}" for key, value in figures.items()))
    arguments.output.write_text(json.dumps({"vlm": arguments.vlm, "splits": found}, indent=2) + "\n")


def by_kind(kinds: list[str], captions: list[str], written: list[str]) -> dict[str, dict[str, float | None]]:
    """For each kind, and for "all": exact_match, token_f1, cider, count, and name and tone apart."""
    table: dict[str, dict[str, float | None]] = {}
    for kind in [*dict.fromkeys(kinds), "all"]:
        here = [i for i, of in enumerate(kinds) if kind in (of, "all")]
        mine, right = [written[i] for i in here], [[captions[i]] for i in here]
        table[kind] = {**score(mine, right), **match_parts(mine, right)}
    return table


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
