"""What a VLM says about samples of a data set, beside what it should have said."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from vpgtrans.data.mixture import Mixture
from vpgtrans.data.sample import Sample
from vpgtrans.errors import DataError, Dropped
from vpgtrans.evaluation.intervals import ratio_interval
from vpgtrans.evaluation.metrics import score, score_each
from vpgtrans.layout import Layout
from vpgtrans.prompts import Encoded, turns_of
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)
_BATCH = 16


@dataclass
class Answers:
    """Predictions, references and losses belong together, one a sample."""

    rows: list[int] = field(default_factory=list)
    """Samples that could be asked about."""
    predictions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    """Summed over a sample's answer tokens; empty where no loss was asked for."""
    tokens: list[float] = field(default_factory=list)
    """Answer tokens of each, likewise."""
    unreadable: int = 0
    dropped: int = 0
    """Left out by a rule, too long, or with nothing to ask (documents)."""


@torch.no_grad()
def answer(vlm: VLM, mixture: Mixture, rows: Sequence[int], *, max_new_tokens: int, with_loss: bool = False) -> Answers:
    """Have the last turn of each sample written, given everything before it."""
    found = Answers()
    prompter = vlm.splice.prompter
    for start in range(0, len(rows), _BATCH):
        kept: list[tuple[int, Sample, Encoded, np.ndarray]] = []
        images: list[Image.Image] = []
        layouts: list[Layout] = []
        for row in rows[start : start + _BATCH]:
            source, index = mixture.locate(row)
            try:
                sample = source.sample(index)
                turns = turns_of(sample.text)
                if len(turns) < 2:
                    raise Dropped("a document: nothing to ask")
                opened, sizes = source.open_sized(sample) if prompter.layouts is not None else (source.open(sample), [])
                encoded = prompter.encode(turns, sizes)
                before = prompter.question(turns[:-1], sizes, room=max_new_tokens)
            except Dropped:
                found.dropped += 1
            except DataError as error:
                _LOGGER.warning("skipped: %s", error)
                found.unreadable += 1
            else:
                kept.append((row, sample, encoded, before))
                images += opened
                layouts += prompter.laid_out(turns, sizes)
        if not kept:
            continue
        prompts = vlm.prompts(images, layouts).flatten(0, -2)
        if with_loss:
            # Of a sample that was cut the images that are left.
            there = [place < text.images for _, sample, text, _ in kept for place in range(len(sample.images))]
            visual = torch.tensor([layout.visual for layout in layouts], dtype=torch.long)
            left = torch.tensor(there, dtype=torch.bool).repeat_interleave(visual).to(prompts.device)
            nll, of = vlm.splice.token_nll(prompts[left], [encoded for _, _, encoded, _ in kept])
            found.nll += torch.zeros(len(kept), device=nll.device).index_add_(0, of, nll).tolist()
            found.tokens += torch.bincount(of, minlength=len(kept)).double().tolist()
        found.predictions += vlm.splice.write(prompts, [before for *_, before in kept], max_new_tokens=max_new_tokens)
        found.references += [list(sample.references) for _, sample, _, _ in kept]
        found.rows += [row for row, *_ in kept]
    return found


def scores(said: Answers) -> dict[str, Any]:
    """Means over what was answered, and `intervals`: the 95 % interval of each, by bootstrap over the samples.

    With the loss a token (`val_loss`), where it was asked for. Without an answer there is a count of 0 alone.
    """
    if not said.predictions:
        return {"count": 0}
    found: dict[str, Any] = {}
    intervals: dict[str, tuple[float, float]] = {}
    if said.nll:
        found["val_loss"] = sum(said.nll) / sum(said.tokens)
        intervals["val_loss"] = ratio_interval(said.nll, said.tokens)
    found |= score(said.predictions, said.references)
    for name, values in score_each(said.predictions, said.references).items():
        intervals[name] = ratio_interval(values)
    return found | {"intervals": {name: list(ends) for name, ends in intervals.items()}}
