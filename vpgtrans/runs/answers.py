"""What a VLM says about samples of a data set, beside what it should have said."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from vpgtrans.data.mixture import Mixture
from vpgtrans.data.sample import Sample
from vpgtrans.errors import DataError, Dropped
from vpgtrans.prompts import turns_of
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)
_BATCH = 16


@dataclass
class Answers:
    """Predictions and references belong together; the loss is over all answer tokens."""

    predictions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    nll: float = 0.0
    tokens: float = 0.0
    unreadable: int = 0
    dropped: int = 0
    """Left out by a rule, or with nothing to ask (documents)."""


@torch.no_grad()
def answer(vlm: VLM, mixture: Mixture, rows: Sequence[int], *, max_new_tokens: int, with_loss: bool = False) -> Answers:
    """Have the last turn of each sample written, given everything before it."""
    found = Answers()
    for start in range(0, len(rows), _BATCH):
        samples: list[Sample] = []
        images: list[Image.Image] = []
        for row in rows[start : start + _BATCH]:
            source, index = mixture.locate(row)
            try:
                sample = source.sample(index)
                vlm.splice.prompter.encode(sample.text)
                opened = source.open(sample)
            except Dropped:
                found.dropped += 1
            except DataError as error:
                _LOGGER.warning("skipped: %s", error)
                found.unreadable += 1
            else:
                if len(turns_of(sample.text)) < 2:
                    found.dropped += 1
                    continue
                samples.append(sample)
                images += opened
        if not samples:
            continue
        prompts = vlm.prompts(images)
        if with_loss:
            nll, _ = vlm.splice.token_nll(prompts, [sample.text for sample in samples])
            found.nll += nll.sum().item()
            found.tokens += len(nll)
        before = [vlm.splice.prompter.question(turns_of(sample.text)[:-1]) for sample in samples]
        found.predictions += vlm.splice.write(prompts, before, max_new_tokens=max_new_tokens)
        found.references += [list(sample.references) for sample in samples]
    return found
