"""The default converter fit on tables of a large model: time against the bare matrix products, and memory.

    python benchmarks/converter_scale.py                            # 150,000 × 4,096 -> 4,096, bf16, memory-mapped
    python benchmarks/converter_scale.py --rows 20000 --width 1024  # small enough to try

The bare products are XᵀX, XᵀY and YᵀY in float32 over chunks that lie in memory already: no gathering, no centring, no
decomposition. They are timed on every `--every`-th chunk, before and after the fit, and scaled to all rows.
Seconds are the process's CPU seconds beside wall seconds: with one thread they are what an idle machine takes, also
where others share it; the ratio is of CPU seconds.
Memory is the peak of the process's anonymous pages above what it held before; mapped pages of the tables are inputs.
Writes benchmarks/results/converter_scale.json.
"""

import argparse
import json
import logging
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vpgtrans.config import InitialiserConfig
from vpgtrans.transfer.converters import CHUNK, TOKEN_CAP, Rows, fit

log = logging.getLogger("converter_scale")
RESULTS = Path(__file__).parent / "results" / "converter_scale.json"


def make_tables(directory: Path, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bf16 tables on disk that share a structure of rank 64, mapped; rows shuffled by the ids later."""
    generator = torch.Generator().manual_seed(0)
    mix = [torch.randn(64, width, generator=generator) for _ in range(2)]
    tables = []
    for name in ("source", "target"):
        path = directory / f"{name}.bin"
        with path.open("wb"):
            pass
        tables.append(
            torch.from_file(str(path), shared=True, size=rows * width, dtype=torch.bfloat16).view(rows, width)
        )
    for start in range(0, rows, CHUNK):
        stop = min(start + CHUNK, rows)
        shared = torch.randn(stop - start, 64, generator=generator)
        for table, m in zip(tables, mix, strict=True):
            noise = torch.randn(stop - start, width, generator=generator)
            table[start:stop] = 0.02 * (shared @ m / 8 + noise) + 0.01
    return tables[0], tables[1]


def anonymous_bytes() -> int:
    """Resident memory that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


@contextmanager
def peak(bill: dict[str, float]) -> Iterator[None]:
    """Seconds and peak anonymous memory of the block."""
    base, most, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], anonymous_bytes() - base)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    yield
    bill["seconds"], bill["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    bill["peak_bytes"] = most[0]


def bare_products(rows: int, width: int, chunks: int) -> float:
    """CPU seconds for all rows, from `chunks` chunks."""
    x, y = torch.randn(CHUNK, width), torch.randn(CHUNK, width)
    start = time.process_time()
    for _ in range(chunks):
        for a, b in ((x, x), (x, y), (y, y)):
            a.T @ b
    return (time.process_time() - start) * rows / (chunks * CHUNK)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--every", type=int, default=9, help="time the bare products on every n-th chunk, twice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scratch", type=Path, help="where the tables go (2.5 GB); a temporary directory if not given")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    chunks = max(1, args.rows // CHUNK // args.every)
    config = InitialiserConfig(kind="converter", fit="cca", max_tokens=args.rows)
    with tempfile.TemporaryDirectory(dir=args.scratch) as directory:
        source, target = make_tables(Path(directory), args.rows, args.width)
        ids = torch.randperm(args.rows, generator=torch.Generator().manual_seed(1))
        X, Y = Rows(source, ids), Rows(target, ids.flip(0))
        capped: dict[str, float] = {}
        with peak(capped):
            fit(InitialiserConfig(kind="converter", fit="cca"), X, Y)
        log.info(
            "default cap of %d: %.1f s of CPU, %.2f GB", TOKEN_CAP, capped["cpu_seconds"], capped["peak_bytes"] / 1e9
        )
        before = bare_products(args.rows, args.width, chunks)
        log.info("bare products: %.1f s", before)
        whole: dict[str, float] = {}
        with peak(whole):
            fit(config, X, Y)
        log.info("all tokens: %.1f s of CPU, %.2f GB", whole["cpu_seconds"], whole["peak_bytes"] / 1e9)
        after = bare_products(args.rows, args.width, chunks)
        log.info("bare products again: %.1f s", after)
    bare = (before + after) / 2
    report = {
        "command": "python benchmarks/converter_scale.py",
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "rows": args.rows,
        "width": args.width,
        "bare_products_cpu_seconds": bare,
        "bare_products_measured": {"chunks_each": chunks, "before": before, "after": after},
        "all_tokens": whole | {"over_bare_products": whole["cpu_seconds"] / bare},
        "default_cap": capped | {"tokens": TOKEN_CAP},
    }
    log.info("%.2f times the bare products", whole["cpu_seconds"] / bare)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
