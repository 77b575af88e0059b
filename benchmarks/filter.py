"""How many spoiled captions does `vpgtrans data filter` find?

    python benchmarks/filter.py [VLM] [--others 8] [--draws 20] [--output results/filter.json]
    python benchmarks/filter.py --limit 32 --others 2       # to try it

A caption is spoiled by giving it another image's of as many words, or nearly. Each of openmoji's held-out images
(validation and test) is scored twice, with its own caption and with a spoiled one. Then a tenth of them is drawn to be
the spoiled ones, the filter removes a tenth, and what counts is the share of spoiled captions that it removes. Only the
draw is repeated, so twenty of them cost no more than one; the figures are mean, smallest and largest over the draws.

`union` keeps what any of the scores keeps, `intersection` what all of them keep: they remove less and more than a
tenth, and the share that they remove stands beside.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vpgtrans.data.config import DataSource
from vpgtrans.data.filter.build import plan
from vpgtrans.data.filter.choose import Rule, choose
from vpgtrans.data.filter.models import VLM_SCORES
from vpgtrans.data.filter.run import filter_data
from vpgtrans.data.openmoji import build_openmoji
from vpgtrans.runs.parts import open_vlm, pick_device

RESULTS = Path(__file__).parent / "results" / "filter.json"
SHARE = 0.1
"""Of the captions that are spoiled, and of the rows that are removed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vlm", nargs="?", default="runs/quickstart")
    parser.add_argument("--others", type=int, default=8, help="other images that a caption is tried with")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--limit", type=int, help="take the first images only")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    tables = [pq.read_table(build_openmoji() / f"{split}.parquet") for split in ("validation", "test")]
    table = pa.concat_tables([t.select(["id", "image", "caption"]) for t in tables]).slice(0, arguments.limit)
    captions = table["caption"].to_pylist()
    wrong = swapped(captions, random.Random(0))
    started = time.perf_counter()
    true, false = (scored(table, said, arguments.vlm, others=arguments.others) for said in (captions, wrong))
    seconds = time.perf_counter() - started
    found = measure(true, false, draws=arguments.draws)
    print(f"{arguments.vlm}: {len(captions)} images, {seconds:.0f} s")
    for name, figures in found.items():
        recall = figures["recall"]
        print(
            f"  {name:14} recall {recall['mean']:.3f} [{recall['min']:.3f} - {recall['max']:.3f}], "
            f"removed {figures['removed']:.3f}"
        )
    settings = {"vlm": arguments.vlm, "images": len(captions), "others": arguments.others, "draws": arguments.draws}
    arguments.output.write_text(json.dumps({**settings, "seconds": seconds, "scores": found}, indent=2) + "\n")


def swapped(captions: Sequence[str], generator: random.Random) -> list[str]:
    """For each caption one of another text, with the number of words that comes nearest."""
    words = [len(caption.split()) for caption in captions]
    result = []
    for own, length in zip(captions, words, strict=True):
        others = [(abs(count - length), other) for other, count in zip(captions, words, strict=True) if other != own]
        nearest = min(distance for distance, _ in others)
        result.append(generator.choice([other for distance, other in others if distance == nearest]))
    return result


def scored(table: Any, captions: Sequence[str], vlm: str, *, others: int) -> dict[str, np.ndarray]:
    """Scores [n] of the images with these captions, as the filter writes them."""
    with tempfile.TemporaryDirectory() as directory:
        data, scores = Path(directory) / "data.parquet", Path(directory) / "scores.parquet"
        place = table.column_names.index("caption")
        pq.write_table(table.set_column(place, "caption", pa.array(captions)), data)
        scorers, rules = plan(
            scorers=list(VLM_SCORES),
            vlm=vlm,
            others=others,
            open_vlm=partial(open_vlm, device="auto"),
            device=pick_device("auto"),
        )
        filter_data(DataSource(dataset=str(data)), scores, scorers, rules=rules)
        written = pq.read_table(scores)
    return {name: written[name].to_numpy() for name in VLM_SCORES}


def measure(true: Mapping[str, np.ndarray], false: Mapping[str, np.ndarray], *, draws: int) -> dict[str, Any]:
    """Recall of spoiled captions, and the share of rows that is removed, by each score and by all together."""
    rules = {name: Rule(better, fraction=1 - SHARE) for name, better in VLM_SCORES.items()}
    ways = {name: ([name], False) for name in rules}
    ways |= {"union": (list(rules), True), "intersection": (list(rules), False)}
    size = len(next(iter(true.values())))
    recalls: dict[str, list[float]] = {way: [] for way in ways}
    removed: dict[str, list[float]] = {way: [] for way in ways}
    for draw in range(draws):
        spoiled = np.zeros(size, dtype=bool)
        spoiled[np.random.default_rng(draw).permutation(size)[: round(SHARE * size)]] = True
        scores = {name: np.where(spoiled, false[name], true[name]) for name in rules}
        for way, (names, union) in ways.items():
            gone = ~choose({n: scores[n] for n in names}, {n: rules[n] for n in names}, union=union)
            recalls[way].append(float(gone[spoiled].mean()))
            removed[way].append(float(gone.mean()))
    return {
        way: {
            "recall": {"mean": float(np.mean(found)), "min": min(found), "max": max(found)},
            "removed": float(np.mean(removed[way])),
        }
        for way, found in recalls.items()
    }


if __name__ == "__main__":
    main()
