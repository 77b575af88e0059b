"""How full do packs get, and how long does planning take, beside other packers run from their own packages?

    pip install --no-deps -t packers axolotl binpacking cffi lightbinpack llamafactory llvmlite mip numba prtpy trl
    python benchmarks/packing.py [--packers packers] [--samples 100000] [--limit 30] [--output results/packing.json]
    python benchmarks/packing.py --samples 2000 --million 4000      # to try it

Four mixes at 4,096 tokens. The lengths are synthetic, drawn so that padding, next-fit and best-fit decreasing fill them
as they fill such data: captions of 144 visual tokens and a short text, instructions with 576 (and a few without image),
images of 1 to 17 tiles of 64, and 729 with a long text. Every packer runs in a process of its own, one thread, and is
stopped after `--limit` seconds, imports included; what its packs hold is counted here. Packers that are not installed
are left out.
"""

import argparse
import heapq
import importlib
import importlib.util
import json
import math
import multiprocessing
import platform
import resource
import sys
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np

from vpgtrans.data.packing import StreamPacker, fewest_packs, pack

RESULTS = Path(__file__).parent / "results" / "packing.json"
CAPACITY = 4096
Packs = Iterable[Sequence[int]]
"""The lengths in each pack."""


# --- mixes --------------------------------------------------------------------------------------


def _text(generator: np.random.Generator, count: int, median: float, sigma: float) -> np.ndarray:
    return np.rint(generator.lognormal(math.log(median), sigma, count)).clip(min=1)


def captions(generator: np.random.Generator, count: int) -> np.ndarray:
    return 144 + _text(generator, count, 25, 0.5)


def instructions(generator: np.random.Generator, count: int) -> np.ndarray:
    text = _text(generator, count, 150, 0.8)
    return text + 576 * (generator.random(count) >= 0.06)


def tiles(generator: np.random.Generator, count: int) -> np.ndarray:
    return 64 * (1 + np.floor(17 * generator.random(count) ** 2.1)) + _text(generator, count, 120, 1.0)


def long_text(generator: np.random.Generator, count: int) -> np.ndarray:
    return 729 + _text(generator, count, 290, 0.87)


MIXES = {
    "captions": captions,
    "SFT, 576 image tokens": instructions,
    "tiles 64 x 1-17": tiles,
    "729 + long text": long_text,
}


def lengths_of(mix: str, count: int) -> np.ndarray:
    return MIXES[mix](np.random.default_rng(0), count).astype(np.int64).clip(max=CAPACITY)


# --- packers ------------------------------------------------------------------------------------


def ours(lengths: np.ndarray) -> Packs:
    plan = pack(lengths, max_tokens=CAPACITY)
    return [lengths[plan.pack(number)] for number in range(len(plan))]


def our_stream(lengths: np.ndarray) -> Packs:
    packer, packs = StreamPacker(max_tokens=CAPACITY, window=10_000), []
    for length in lengths.tolist():
        packs += packer.add(length)
    return [lengths[held] for held in [*packs, *packer.finish()]]


def next_fit(lengths: np.ndarray) -> Packs:
    packs, room = [[]], CAPACITY
    for length in lengths.tolist():
        if length > room:
            packs.append([])
            room = CAPACITY
        packs[-1].append(length)
        room -= length
    return packs


def best_fit_decreasing(lengths: np.ndarray) -> Packs:
    by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []
    packs = []
    for length in np.sort(lengths)[::-1].tolist():
        place = bisect_left(rooms, length)
        if place == len(rooms):
            held, room = [], CAPACITY
            packs.append(held)
        else:
            room = rooms[place]
            held = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(place)
        held.append(length)
        room -= length
        if not by_room.setdefault(room, []):
            insort(rooms, room)
        by_room[room].append(held)
    return packs


def worst_fit_decreasing(lengths: np.ndarray) -> Packs:
    heap: list[tuple[int, int]] = []
    packs: list[list[int]] = []
    for length in np.sort(lengths)[::-1].tolist():
        if heap and heap[0][0] + length <= CAPACITY:
            load, number = heap[0]
            packs[number].append(length)
            heapq.heapreplace(heap, (load + length, number))
        else:
            heapq.heappush(heap, (length, len(packs)))
            packs.append([length])
    return packs


def trl_bfd(lengths: np.ndarray) -> Packs:
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.int8))
    return _pack_bfd(pa.table({"input_ids": tokens}), CAPACITY)["seq_lengths"].to_pylist()


def llamafactory_knapsack(lengths: np.ndarray) -> Packs:
    # Its package imports torchaudio; this file of it stands alone.
    place = importlib.util.find_spec("llamafactory").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(
        "llamafactory_knapsack", Path(place, "data", "processor", "processor_utils.py")
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    # As in its preprocessing: a thousand samples at a time.
    chunks = (lengths[first : first + 1000].tolist() for first in range(0, len(lengths), 1000))
    return [held for chunk in chunks for held in module.greedy_knapsack(chunk, CAPACITY)]


def axolotl_multipack(lengths: np.ndarray) -> Packs:
    from axolotl.utils.samplers.multipack import pack_group

    packs = pack_group(lengths, 0, CAPACITY, len(lengths), CAPACITY)  # one of its groups of 100,000
    return [lengths[held] for held in packs]


def binpacking_volume(lengths: np.ndarray) -> Packs:
    import binpacking

    return binpacking.to_constant_volume(lengths.tolist(), CAPACITY)


def prtpy_bfd(lengths: np.ndarray) -> Packs:
    from prtpy import pack as run
    from prtpy.packing.best_fit import decreasing

    return run(algorithm=decreasing, binsize=CAPACITY, items=lengths.tolist())


def lightbinpack_of(name: str) -> Callable[[np.ndarray], Packs]:
    def run(lengths: np.ndarray) -> Packs:
        packer = getattr(importlib.import_module("lightbinpack"), name)
        return [lengths[held] for held in packer(lengths.tolist(), CAPACITY)]

    return run


PACKERS: dict[str, tuple[str | None, Callable[[np.ndarray], Packs]]] = {
    "ours": (None, ours),
    "ours, a stream with a window of 10,000": (None, our_stream),
    "next-fit": (None, next_fit),
    "best-fit decreasing": (None, best_fit_decreasing),
    "worst-fit decreasing, a heap": (None, worst_fit_decreasing),
    "TRL `bfd`": ("trl", trl_bfd),
    "lightbinpack `obfd`": ("lightbinpack", lightbinpack_of("obfd")),
    "lightbinpack `ffd`": ("lightbinpack", lightbinpack_of("ffd")),
    "LLaMA-Factory `greedy_knapsack`, chunks of 1,000": ("llamafactory", llamafactory_knapsack),
    "axolotl multipack, a group": ("axolotl", axolotl_multipack),
    "binpacking `to_constant_volume`": ("binpacking", binpacking_volume),
    "prtpy `best_fit.decreasing`": ("prtpy", prtpy_bfd),
}


# --- measuring ----------------------------------------------------------------------------------


def padded(lengths: np.ndarray) -> float:
    """The share of real tokens in batches of 8, padded to the longest."""
    batches = lengths[: len(lengths) // 8 * 8].reshape(-1, 8)
    return float(batches.sum() / (batches.max(axis=1).sum() * 8))


def play(packer: str, lengths: np.ndarray) -> dict[str, Any]:
    """Run a packer on lengths; its first call, on a few of them, imports and compiles."""
    run = PACKERS[packer][1]
    run(lengths[:64])
    started = time.perf_counter()
    packs = run(lengths)
    seconds = time.perf_counter() - started
    packs = [list(map(int, held)) for held in packs]
    assert max(map(sum, packs)) <= CAPACITY, packer
    assert sorted(length for held in packs for length in held) == np.sort(lengths).tolist(), packer
    return {"packs": len(packs), "fill": float(lengths.sum() / (len(packs) * CAPACITY)), "seconds": seconds}


def plan_many(lengths: np.ndarray) -> dict[str, Any]:
    """Seconds and peak memory of one plan; the best of three, for other processes run beside it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        plan = pack(lengths, max_tokens=CAPACITY)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        **plan.statistics,
        "seconds": min(seconds),
        "samples_per_second": len(lengths) / min(seconds),
        "fewest": fewest_packs(lengths, max_tokens=CAPACITY),
        "bytes_per_sample": peak * 1024 / len(lengths),
    }


def apart(call: Callable[..., Any], *arguments: Any, limit: float) -> Any:
    """A call in a process of its own; None where it takes more than `limit` seconds.

    Raises:
        RuntimeError: it failed.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(queue, call, arguments, sys.path))
    process.start()
    try:
        fine, answer = queue.get(timeout=limit)
    except Empty:
        return None
    finally:
        process.kill()
        process.join()
    if not fine:
        raise RuntimeError(answer)
    return answer


def _answer(queue: Any, call: Callable[..., Any], arguments: tuple[Any, ...], path: list[str]) -> None:
    sys.path[:] = path
    try:
        queue.put((True, call(*arguments)))
    except Exception as error:
        queue.put((False, f"{type(error).__name__}: {error}"))


def measure(count: int, million: int, *, limit: float) -> dict[str, Any]:
    installed = {name: version(name) for name, _ in PACKERS.values() if name is not None}
    mixes = {}
    for mix in MIXES:
        lengths = lengths_of(mix, count)
        found: dict[str, Any] = {
            "padded": padded(lengths),
            "mean": float(lengths.mean()),
            "by_sum": math.ceil(lengths.sum() / CAPACITY),
            "fewest": fewest_packs(lengths, max_tokens=CAPACITY),
            "packers": {},
        }
        for name, (package, _) in PACKERS.items():
            if package is None or installed[package]:
                found["packers"][name] = apart(play, name, lengths, limit=limit)
                print(f"{mix:24} {name:50} {found['packers'][name]}", file=sys.stderr, flush=True)
        found["planned"] = apart(plan_many, lengths_of(mix, million), limit=600)
        mixes[mix] = found
    versions = {name: found for name, found in installed.items() if found}
    return {"versions": {**versions, "numpy": np.__version__, "python": platform.python_version()}, "mixes": mixes}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def table(found: dict[str, Any]) -> str:
    mixes = found["mixes"]
    rows = [["fill (seconds)", *mixes], ["---"] * (len(mixes) + 1)]
    rows.append(["padded, batches of 8", *(f"{mix['padded']:.3f}" for mix in mixes.values())])
    for name in next(iter(mixes.values()))["packers"]:
        played = [mix["packers"][name] for mix in mixes.values()]
        rows.append([name, *(f"{p['fill']:.4f} ({p['seconds']:.2f})" if p else "too slow" for p in played)])
    rows.append(["packs: ours", *(str(mix["packers"]["ours"]["packs"]) for mix in mixes.values())])
    rows.append(["packs: sum over limit", *(str(mix["by_sum"]) for mix in mixes.values())])
    rows.append(["packs: lower bound", *(str(mix["fewest"]) for mix in mixes.values())])
    rows.append(["samples a second, many", *(f"{m['planned']['samples_per_second']:,.0f}" for m in mixes.values())])
    rows.append(["fill, many", *(f"{m['planned']['fill']:.4f}" for m in mixes.values())])
    rows.append(["bytes a sample, many", *(f"{m['planned']['bytes_per_sample']:.0f}" for m in mixes.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packers", type=Path, help="where they are installed, if not beside this package")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--million", type=int, default=1_000_000, help="samples whose planning is timed")
    parser.add_argument("--limit", type=float, default=30, help="seconds that a packer may take")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.packers:
        sys.path.append(str(arguments.packers.resolve()))
    found = measure(arguments.samples, arguments.million, limit=arguments.limit)
    print(table(found))
    settings = {"samples": arguments.samples, "million": arguments.million, "limit_seconds": arguments.limit}
    arguments.output.write_text(json.dumps({**settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
