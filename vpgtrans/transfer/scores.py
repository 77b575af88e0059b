"""Zero-training scores: of a word converter on held-out words, and of visual prompts on captions.

Cosine and recall mis-rank converters: what decides is whether the target LLM can *read* what was converted. The copy
test asks it: converted source embeddings of a caption stand where words would, and the LLM must repeat the caption.

    bos SENTENCE newline SENTENCE newline newline      one worked example in the target's own words
    converted source embeddings of the caption
    newline CAPTION                                    the loss is on the caption's tokens

Its two ends are the target's own embeddings (0 lost) and the target's mean vector (nothing readable):
copy gap recovered = (NLL_mean − NLL) / (NLL_mean − NLL_native).
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpgtrans.errors import TransferError
from vpgtrans.llm import word_ids
from vpgtrans.prompts import Text
from vpgtrans.transfer.converters import Rows
from vpgtrans.transfer.pairing import TokenPairs, Words, token_bytes, word_form

log = logging.getLogger(__name__)

Convert = Callable[[Tensor], Tensor]
"""Source embeddings [n, d_s] -> target embeddings [n, d_t]."""

CaptionNLL = Callable[[Tensor, Sequence[Text]], tuple[Tensor, Tensor]]
"""Visual prompts [B, T, d_t] and B captions -> summed NLL [B], tokens [B]; `VLM.caption_nll`."""

EXAMPLE = "A cat sits on a mat."


# --- held-out words -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WordScores:
    """Of converted held-out words against the target's own."""

    cosine: float
    """Mean cosine. A constant predictor already has .66 on real tables."""
    centred_cosine: float
    """The same with the target words' mean subtracted on both sides."""
    recall_at_1: float
    """Share whose nearest held-out target word (centred cosine) is the right one."""
    norm_ratio: float
    """RMS around the mean, converted over true."""


@torch.no_grad()
def word_scores(convert: Convert, X: Rows, Y: Rows, *, chunk: int = 2048) -> WordScores:
    """Scores on held-out pairs X [n, d_s], Y [n, d_t]."""
    converted = torch.cat([convert(X.chunk(i, i + chunk)).float() for i in range(0, len(X), chunk)])
    true = Y.chunk(0, len(Y))
    mean = true.mean(dim=0)
    cosine = F.cosine_similarity(converted, true).mean().item()
    ratio = (converted - converted.mean(dim=0)).norm() / (true - mean).norm()
    converted, true = F.normalize(converted - mean, dim=1), F.normalize(true - mean, dim=1)
    right = 0
    for start in range(0, len(converted), chunk):
        nearest = (converted[start : start + chunk] @ true.T).argmax(dim=1)
        right += int((nearest == torch.arange(start, start + len(nearest))).sum())
    return WordScores(
        cosine=cosine,
        centred_cosine=(converted * true).sum(dim=1).mean().item(),
        recall_at_1=right / len(converted),
        norm_ratio=ratio.item(),
    )


# --- the copy test ------------------------------------------------------------------------------


@functools.cache
def copy_captions() -> tuple[str, ...]:
    """Ninety-six plain sentences about everyday scenes, written for this test."""
    text = (files("vpgtrans.transfer") / "copy_captions.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


class CopyTest:
    """Can `llm`, the target, read captions through converted embeddings of the source's words?

    Args:
        source: the source LLM's words. llm: the target, an `llm.LanguageModel`.
        captions: texts to repeat; `copy_captions()` if None. limit: at most this many of them.
    """

    def __init__(
        self, source: Words, llm: Any, captions: Sequence[str] | None = None, *, limit: int = 64, batch_size: int = 16
    ):
        captions = list(copy_captions() if captions is None else captions)[:limit]
        if not captions:
            raise TransferError("the copy test needs at least one caption")
        self.source, self.llm, self.batch_size = source, llm, batch_size
        # Alike lengths share a batch: less padding.
        self.captions = sorted(captions, key=len)
        self.source_ids = [self._ids(source.tokenizer, caption) for caption in self.captions]
        self.target_ids = [self._ids(llm.tokenizer, caption) for caption in self.captions]
        bos = llm.tokenizer.bos_token_id
        prefix = self._ids(llm.tokenizer, f"{EXAMPLE}\n{EXAMPLE}\n\n")
        self._prefix = prefix if bos is None else torch.cat([torch.tensor([bos]), prefix])
        self._middle = self._ids(llm.tokenizer, "\n")

    def kept_out(self, pairs: TokenPairs) -> TokenPairs:
        """`pairs` without any case or space variant of a caption's token: what a converter under test is fitted on."""
        found: set[str] = set()
        for tokenizer, rows in ((self.source.tokenizer, self.source_ids), (self.llm.tokenizer, self.target_ids)):
            table = token_bytes(tokenizer)
            found |= {word_form(table[i]) for ids in rows for i in ids.tolist() if i in table}
        return pairs.take(torch.tensor([word_form(text) not in found for text in pairs.texts], dtype=torch.bool))

    @functools.cached_property
    def native(self) -> float:
        """NLL a token through the target's own embeddings: the best there is."""
        return self._nll([self._embed(ids) for ids in self.target_ids])

    @functools.cached_property
    def mean(self) -> float:
        """NLL a token where every converted word is the target words' mean: nothing to read."""
        # Not every id of the tokenizer: it may have more than the table has rows.
        ids = word_ids(self.llm.tokenizer, self.llm.fingerprint.vocabulary)
        vectors = self._embed(ids).mean(dim=0)
        return self._nll([vectors.expand(len(ids), -1) for ids in self.source_ids])

    def nll(self, convert: Convert) -> float:
        """NLL a token through converted embeddings."""
        ids = torch.unique(torch.cat(self.source_ids))
        converted = convert(self.source.matrix[ids].float())
        return self._nll([converted[torch.searchsorted(ids, row)] for row in self.source_ids])

    def gap_recovered(self, nll: float) -> float:
        """1: as readable as the target's own words; 0: as their mean."""
        return (self.mean - nll) / (self.mean - self.native)

    @staticmethod
    def _ids(tokenizer: Any, text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    def _embed(self, ids: Tensor) -> Tensor:
        device = self.llm.model.get_input_embeddings().weight.device
        with torch.no_grad():
            parts = [self.llm.embed(part.to(device)).float().cpu() for part in ids.split(16_384)]
        return torch.cat(parts)

    @torch.no_grad()
    def _nll(self, prompts: Sequence[Tensor]) -> float:
        layer = self.llm.model.get_input_embeddings().weight
        total, count = 0.0, 0
        prefix, middle = self._embed(self._prefix), self._embed(self._middle)
        for start in range(0, len(prompts), self.batch_size):
            answers = self.target_ids[start : start + self.batch_size]
            rows = [
                torch.cat([prefix, prompt, middle, self._embed(answer)])
                for prompt, answer in zip(prompts[start : start + self.batch_size], answers, strict=True)
            ]
            embeddings = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = (torch.arange(embeddings.shape[1]) < lengths[:, None]).long()
            # The head runs from the first position that predicts an answer token of any row.
            first = min(len(row) - len(answer) - 1 for row, answer in zip(rows, answers, strict=True))
            logits = self.llm.model(
                inputs_embeds=embeddings.to(layer.device, layer.dtype),
                attention_mask=mask.to(layer.device),
                use_cache=False,
                logits_to_keep=embeddings.shape[1] - first,
            ).logits
            for row, answer, out in zip(rows, answers, logits, strict=True):
                stop = len(row) - 1 - first
                wanted = out[stop - len(answer) : stop].float()
                total += F.cross_entropy(wanted, answer.to(wanted.device), reduction="sum").item()
                count += len(answer)
        return total / count


# --- the image gap ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageGap:
    """What the images add to the loss on captions, before any training; nats a token."""

    loss: float
    """With the right images."""
    gap: float
    """Loss with shuffled images minus loss: information about the image, not about the captions' style."""
    low: float
    """Ends of the 95 % bootstrap interval over samples."""
    high: float

    @property
    def signal(self) -> bool:
        """The interval lies above zero."""
        return self.low > 0


def image_gap(
    caption_nll: CaptionNLL, prompts: Tensor, captions: Sequence[Text], *, seed: int = 0, resamples: int = 2000
) -> ImageGap:
    """Score visual prompts [n, T, d_t] on their captions, against the prompts of other images.

    Raises:
        TransferError: fewer than two different captions, so nothing can be shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    other = _shuffled(captions, generator)
    right, tokens = caption_nll(prompts, captions)
    wrong, _ = caption_nll(prompts[other], captions)
    right, wrong, tokens = right.double(), wrong.double(), tokens.double()
    index = torch.randint(len(captions), (resamples, len(captions)), generator=generator)
    gaps = (wrong - right)[index].sum(dim=1) / tokens[index].sum(dim=1)
    low, high = torch.quantile(gaps, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ImageGap(
        loss=(right.sum() / tokens.sum()).item(),
        gap=((wrong - right).sum() / tokens.sum()).item(),
        low=low,
        high=high,
    )


def _shuffled(captions: Sequence[Text], generator: torch.Generator) -> Tensor:
    """For each sample the index of one with another caption, as far as there are such: a random cycle, repaired."""
    if len(set(captions)) < 2:
        raise TransferError(
            f"the image gap needs samples with different captions, got {len(captions)} with "
            f"{len(set(captions))} caption(s)"
        )
    order = torch.randperm(len(captions), generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    for i, j in enumerate(other.tolist()):
        if captions[i] == captions[j]:
            choices = [k for k, caption in enumerate(captions) if caption != captions[i]]
            other[i] = choices[int(torch.randint(len(choices), (1,), generator=generator))]
    return other
