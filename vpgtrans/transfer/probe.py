"""The probe table: every initialiser scored without training, and the choice that `auto` makes from it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from vpgtrans.config import InitialiserConfig
from vpgtrans.errors import TransferError
from vpgtrans.prompts import Text
from vpgtrans.transfer.converters import Moments, fit, moments
from vpgtrans.transfer.initialisers import Context, Initialisation, initialise
from vpgtrans.transfer.pairing import TokenPairs, same_table
from vpgtrans.transfer.scores import CaptionNLL, CopyTest, image_gap, word_scores

log = logging.getLogger(__name__)

NO_SIGNAL = "no usable signal: warm-up needed"


@dataclass
class ProbeRow:
    """One initialiser's scores; None where a score doesn't apply or its data is missing. JSON-able."""

    name: str
    kind: str
    pairs: int | None = None
    coverage: float | None = None
    """Share of the target's ordinary tokens that are paired."""
    centred_cosine: float | None = None
    recall_at_1: float | None = None
    norm_ratio: float | None = None
    copy_nll: float | None = None
    copy_gap_recovered: float | None = None
    step0_loss: float | None = None
    image_gap: float | None = None
    image_gap_low: float | None = None
    image_gap_high: float | None = None
    prompt_norm_ratio: float | None = None
    seconds: float = 0.0
    """To make the initialisation, not to score it."""
    memory_bytes: int = 0
    """Peak of the process above where it stood, while making it."""
    chosen: bool = False
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Scoring:
    """What candidates are scored with; every part is optional.

    Attributes:
        caption_nll: `VLM.caption_nll` of the target. visual_tokens [n, T, d_vpg], captions: held-out images for it.
        copy_test: of source words and target LLM. each: called with a row as soon as it is scored.
    """

    caption_nll: CaptionNLL | None = None
    visual_tokens: Tensor | None = None
    captions: Sequence[Text] | None = None
    copy_test: CopyTest | None = None
    seed: int = 0
    each: Callable[["ProbeRow"], None] | None = None


@dataclass
class Choice:
    """What `auto` took, and the table it was taken from."""

    initialisation: Initialisation
    rows: list[ProbeRow]
    signal: bool
    """Whether any candidate carries a signal that training needn't build first: an image gap whose interval lies above
    zero or, where no images are scored, a copy gap above zero."""


def default_candidates(config: InitialiserConfig, context: Context) -> list[InitialiserConfig]:
    """What `auto` tries: all closed-form kinds that the context allows, `config`'s settings kept."""

    def variant(**changes: Any) -> InitialiserConfig:
        return config.model_copy(update=changes)

    candidates = []
    if context.projector is not None and context.source is not None:
        if same_table(context.source, context.target):
            candidates.append(variant(kind="keep"))
        alphas = dict.fromkeys((config.alpha, 0.0))
        candidates += [variant(kind="converter", fit="cca", alpha=alpha) for alpha in alphas]
        candidates += [variant(kind="converter", fit=name) for name in ("ridge", "procrustes")]
        if config.fit in ("omp", "sgd"):
            candidates.append(variant(kind="converter"))
        if context.visual_tokens is not None and context.captions:
            closed = config.fit if config.fit != "sgd" else "cca"
            candidates.append(variant(kind="caption-fit", fit=closed))
    candidates.append(variant(kind="inherit"))
    return candidates


def slow_candidates(config: InitialiserConfig, context: Context) -> list[InitialiserConfig]:
    """What the probe table has besides, too slow for `auto` unless `config` names it: omp and the sgd baseline."""
    if context.projector is None or context.source is None:
        return []
    names = [name for name in ("omp", "sgd") if name != config.fit]
    return [config.model_copy(update={"kind": "converter", "fit": name}) for name in names]


def probe(
    candidates: Sequence[InitialiserConfig], context: Context, *, scoring: Scoring | None = None
) -> list[tuple[ProbeRow, Initialisation]]:
    """Make and score every candidate. One that can't be made or scored is a row with a note, and can't be chosen.

    Held-out word scores and the copy test come from a second fit, without the held-out words and the captions' words;
    the projector comes from a fit on all pairs.
    """
    scoring = scoring or Scoring()
    fits = _Fits(context, scoring.copy_test) if context.source is not None else None
    results = []
    for config in candidates:
        if config.kind == "converter" and config.fit in ("omp", "sgd"):
            log.info("%s: fitted twice, which takes a minute or more where tables are large", config.fit)
        row, made = _score(config, context, scoring, fits)
        results.append((row, made))
        if scoring.each is not None:
            scoring.each(row)
        log.info("%s: %s", row.name, row.note or _said(row))
    return results


def _said(row: ProbeRow) -> str:
    """A row's scores, as far as it has any."""
    scores = {"copy gap": row.copy_gap_recovered, "loss": row.step0_loss, "image gap": row.image_gap}
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if value is not None) or "not scored"


def choose(config: InitialiserConfig, context: Context, *, scoring: Scoring | None = None) -> Choice:
    """`auto`: the best image gap where images are scored and one's interval lies above zero, else the best copy gap.

    An embedding table that both LLMs share decides at once: the projector is kept. Where nothing can be scored the
    default converter is taken.

    Raises:
        TransferError: no candidate can be made.
    """
    results = probe(default_candidates(config, context), context, scoring=scoring)
    made = [(row, initialisation) for row, initialisation in results if initialisation is not None]
    if not made:
        raise TransferError("initialiser auto: nothing can be made here. " + "; ".join(row.note for row, _ in results))
    kept = [pair for pair in made if pair[0].kind == "keep"]
    seen = [pair for pair in made if pair[0].image_gap_low is not None and pair[0].image_gap_low > 0]
    copied = [pair for pair in made if pair[0].copy_gap_recovered is not None]
    scored = any(row.image_gap is not None for row, _ in made)
    readable = False
    if kept:
        row, best = kept[0]
        row.note = "both LLMs share one embedding table"
    elif seen:
        row, best = max(seen, key=lambda pair: pair[0].image_gap or 0.0)
        row.note = "best image gap, its interval above zero"
    elif copied:
        row, best = max(copied, key=lambda pair: pair[0].copy_gap_recovered or 0.0)
        readable = not scored and (row.copy_gap_recovered or 0.0) > 0
        row.note = "best copy gap" + ("" if readable else f"; {NO_SIGNAL}")
    else:
        row, best = made[0]
        row.note = "nothing could be scored; the default" + (f"; {NO_SIGNAL}" if scored else "")
    row.chosen = True
    signal = bool(kept or seen or readable)
    if (scored or copied) and not signal:
        measure = "image" if scored else "copy"
        log.warning("initialiser auto: %s (no candidate's %s gap is above zero before training)", NO_SIGNAL, measure)
    best.report["note"] = row.note
    return Choice(best, [row for row, _ in results], signal)


class _Fits:
    """Moments of all pairs and of the scoring subset, each computed once for all closed forms."""

    def __init__(self, context: Context, copy_test: CopyTest | None):
        self.context, self.copy_test = context, copy_test
        self._all: tuple[TokenPairs, Moments, float] | None = None
        self._scoring: tuple[TokenPairs, TokenPairs, Moments] | None = None

    def everything(self, config: InitialiserConfig) -> tuple[TokenPairs, Moments, float]:
        """Pairs, their moments and the seconds these took: part of each converter's bill."""
        if self._all is None:
            start = time.perf_counter()
            pairs = self.context.pairs()
            found = self._moments(pairs, config)
            self._all = pairs, found, time.perf_counter() - start
        return self._all

    def scoring(self, config: InitialiserConfig) -> tuple[TokenPairs, TokenPairs, Moments]:
        """Pairs to fit on, held-out pairs, and the former's moments."""
        if self._scoring is None:
            train, test = self.context.pairs().split(seed=self.context.seed)
            train = train if self.copy_test is None else self.copy_test.kept_out(train)
            self._scoring = train, test, self._moments(train, config)
        return self._scoring

    def _moments(self, pairs: TokenPairs, config: InitialiserConfig) -> Moments:
        from vpgtrans.transfer.converters import TOKEN_CAP

        capped = pairs.take(torch.arange(min(len(pairs), config.max_tokens or TOKEN_CAP)))
        return moments(*self.context.rows(capped))


def _score(config: InitialiserConfig, context: Context, scoring: Scoring, fits: _Fits | None) -> tuple[ProbeRow, Any]:
    row = ProbeRow(name=config.kind, kind=config.kind)
    try:
        return row, _fill(row, config, context, scoring, fits)
    except TransferError as error:
        return ProbeRow(name=row.name, kind=row.kind, note=str(error)), None


def _fill(
    row: ProbeRow, config: InitialiserConfig, context: Context, scoring: Scoring, fits: _Fits | None
) -> Initialisation:
    """Make one candidate and write its scores into `row`."""
    converts = config.kind in ("converter", "caption-fit")
    with _measured() as bill:
        extra = 0.0
        if converts and fits is not None:
            pairs, found, extra = fits.everything(config)
            made = initialise(config, context, pairs=pairs, found=found)
        else:
            made = initialise(config, context)
    row.name = made.name
    row.seconds = made.report["seconds"] + extra
    row.memory_bytes = int(bill["memory_bytes"])
    row.prompt_norm_ratio = made.report.get("prompt_norm_ratio")
    row.pairs, row.coverage = made.report.get("pairs"), made.report.get("coverage")
    if converts and fits is not None:
        train, test, found = fits.scoring(config)
        converter = fit(config, *context.rows(train), found=found, anchors=context.source_prompts())
        words = word_scores(converter, *context.rows(test))
        row.centred_cosine, row.recall_at_1, row.norm_ratio = words.centred_cosine, words.recall_at_1, words.norm_ratio
        # Of a caption fit this scores the converter it started from: its words are all it knows of the source's words.
        if scoring.copy_test is not None and config.kind == "converter":
            row.copy_nll = scoring.copy_test.nll(converter)
            row.copy_gap_recovered = scoring.copy_test.gap_recovered(row.copy_nll)
    if scoring.caption_nll is not None and scoring.visual_tokens is not None and scoring.captions:
        weight = next(made.projector.parameters())
        with torch.no_grad():
            prompts = made.projector(scoring.visual_tokens.to(weight.device, weight.dtype))
        gap = image_gap(scoring.caption_nll, prompts, scoring.captions, seed=scoring.seed)
        row.step0_loss, row.image_gap = gap.loss, gap.gap
        row.image_gap_low, row.image_gap_high = gap.low, gap.high
        if not gap.signal:
            row.note = NO_SIGNAL
    return made


@contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """Seconds, and the peak of this process's resident memory above its start, sampled every 20 ms."""
    process = psutil.Process()
    base = process.memory_info().rss
    bill = {"seconds": 0.0, "memory_bytes": 0.0}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            bill["memory_bytes"] = max(bill["memory_bytes"], process.memory_info().rss - base)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        yield bill
    finally:
        bill["seconds"] = time.perf_counter() - start
        done.set()
        watcher.join()
