"""What a million rows cost: memory that stays flat, and seconds to the first batch.

    python benchmarks/data_memory.py                              # about 5 minutes
    python benchmarks/data_memory.py --rows 20000 --draws 2000    # to try it

A parquet file (JPEGs of 1 to 2 KB, a few thousand distinct ones; row groups of 1,000) and a JSON lines file (captions
and paths of images) of a million rows each. For each, a process of its own opens the mixture, takes the first batch of
32 through the whole loader (read, decode, resize, tokenise), then reads samples (text, and image bytes or path) in
the mixture's order. The peak is the process's resident memory at its highest (VmHWM), of which the imports alone take
what is given beside it; flat means that it is the same after a tenth of the draws and after all.
Writes benchmarks/results/data_memory.json.
"""

import argparse
import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "data_memory.json"
DISTINCT = 4000
GROUP = 1000
BATCH = 32
CASES = ("parquet", "jsonl")
WORDS = ["red", "green", "blue", "old", "small", "dog", "house", "street", "sky", "people"]


def make(folder: Path, rows: int) -> dict[str, int]:
    """Both files; returns their sizes."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(min(rows, DISTINCT)):
        stream = io.BytesIO()
        noise = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
        images.append(stream.getvalue())
    (folder / "images").mkdir()
    for number, image in enumerate(images):
        (folder / f"images/{number}.jpg").write_bytes(image)
    chosen = random.integers(len(images), size=rows)
    captions = [f"{WORDS[a]} {WORDS[b]} {row}" for row, (a, b) in enumerate(random.integers(10, size=(rows, 2)))]
    schema = pa.schema({"image": pa.binary(), "caption": pa.string()})
    with pq.ParquetWriter(folder / "train.parquet", schema, use_dictionary=False) as writer:
        for start in range(0, rows, GROUP):
            some = slice(start, start + GROUP)
            columns = {"image": [images[number] for number in chosen[some]], "caption": captions[some]}
            writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP)
    with (folder / "train.jsonl").open("w") as lines:
        for number, caption in zip(chosen, captions, strict=True):
            lines.write(json.dumps({"image": f"images/{number}.jpg", "caption": caption}) + "\n")
    return {case: (folder / f"train.{case}").stat().st_size for case in CASES}


def resident(field: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "this benchmark reads /proc"
    return int(found[1]) * 1024


def measure(file: Path, draws: int) -> dict[str, Any]:
    """One case, in this process."""
    import torch
    from loader import prompter

    from vpgtrans.config import ImageConfig
    from vpgtrans.data.config import DataSource
    from vpgtrans.data.mixture import open_mixture
    from vpgtrans.training.config import Stage
    from vpgtrans.training.draws import SampleDraws
    from vpgtrans.training.features import FrozenFront
    from vpgtrans.training.loading import Updates
    from vpgtrans.training.samples import BadSamples, Samples
    from vpgtrans.vision.preprocess import ImageTransform

    torch.set_num_threads(1)
    prompts = prompter(["a red dog"])
    found: dict[str, Any] = {"imports": resident("VmHWM")}
    start = time.perf_counter()
    mixture = open_mixture([DataSource(dataset=str(file))])
    found["open_seconds"] = time.perf_counter() - start
    found["open"] = resident("VmHWM")
    vpg: Any = SimpleNamespace(transform=ImageTransform(ImageConfig(size=64)))
    samples = Samples(mixture, FrozenFront(vpg, "pixels"), prompts, bad=BadSamples(0.0), cached=False)
    stage = Stage.model_validate(
        {"name": "s", "trainable": {"projector": "full"}, "batch_size": BATCH, "budget": {"samples": draws}}
    )
    updates = Updates(samples, SampleDraws(samples.mixture, seed=0, stage=stage), start=0, stop=draws // BATCH)
    updates.visited()  # as a run does before its first update
    batch = next(iter(updates))
    found["first_batch_seconds"] = time.perf_counter() - start
    found["rows"] = len(mixture)
    assert len(batch) == BATCH
    started = time.perf_counter()
    read = 0
    for first in range(0, draws, BATCH):
        for row in mixture.draws(0, first, min(draws, first + BATCH)):
            sample = mixture.sample(int(row))
            read += bool(sample.text)
        if first <= draws // 10:
            found["tenth"] = resident("VmHWM")
    found["end"] = resident("VmHWM")
    found["draws"] = read
    found["draws_per_second"] = read / (time.perf_counter() - started)
    return found


def table(report: dict[str, Any]) -> str:
    """As markdown."""
    lines = ["| MB of resident memory | " + " | ".join(CASES) + " |", "|---|" + "---|" * len(CASES)]
    cases = [report[case] for case in CASES]
    titles = {"file": "size of the file", "imports": "peak after the imports", "open": "peak after opening",
              "tenth": "peak after a tenth of the draws", "end": "**peak at the end**"}  # fmt: skip
    for key, title in titles.items():
        lines.append(f"| {title} | " + " | ".join(f"{case[key] / 1e6:.0f}" for case in cases) + " |")
    for key, title in {
        "open_seconds": "seconds to open",
        "first_batch_seconds": "**seconds to the first batch**",
    }.items():
        lines.append(f"| {title} | " + " | ".join(f"{case[key]:.2f}" for case in cases) + " |")
    for key, title in {"rows": "rows", "draws": "draws", "draws_per_second": "draws a second"}.items():
        lines.append(f"| {title} | " + " | ".join(f"{case[key]:,.0f}" for case in cases) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--draws", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # one case, in the process started for it
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.draws)))
        return
    report: dict[str, Any] = {
        "command": f"python benchmarks/data_memory.py --rows {args.rows} --draws {args.draws}",
        "machine": f"{platform.machine()}, pyarrow {pa.__version__}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        sizes = make(Path(scratch), args.rows)
        for case in CASES:
            command = [sys.executable, __file__, "--measure", f"{scratch}/train.{case}", "--draws", str(args.draws)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            report[case] = json.loads(done.stdout.splitlines()[-1]) | {"file": sizes[case]}
    print(table(report))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
