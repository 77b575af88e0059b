"""What a stage minimises, as functions of visual prompts and what is said about the images.

`caption`: the LLM's negative log-likelihood of the caption behind the prompts; what a VLM is trained with.
`words`: the prompts are to lie where the caption's tokens lie in the LLM's embedding space: the first half of them
where its first tokens do, the second half where its last ones do, in order. A word that ends many captions (a skin
tone, a noun behind its adjectives) then has a place of its own, however long what comes before it is. It needs no pass
through the LLM, so it costs a hundredth; and prompts that lie among words are what a *word* converter can carry to
another LLM. It serves as a cheap first stage for a new VPG, or beside `caption` to keep prompts readable.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpgtrans.prompts import answer_of
from vpgtrans.training.samples import Batch
from vpgtrans.vlm import VLM

SHARPNESS = 20.0
"""Squared distances are measured in 1/20 of the words' variance: an exact prompt then beats 2,000 others surely."""
PULL = 3.0
"""Weight of the squared distance to the right word (in units of D) beside the classification, which alone would be
content with prompts on the right side of all words, far away from them, and no LLM reads those."""
FILLER_WEIGHT = 0.1
"""Prompts that no token of the caption is for are drawn to the line break, weakly."""


class Objective(nn.Module, ABC):
    """A loss on visual prompts, summed over a batch, so that micro-batches add up."""

    @abstractmethod
    def forward(self, vlm: VLM, prompts: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Prompts [n, T, d_llm] of the batch's images -> the summed loss, and how many terms it sums."""

    @abstractmethod
    def weight(self, batch: Batch, visual: int) -> float:
        """What the sum over a batch with `visual` prompts an image is divided by."""


class CaptionObjective(Objective):
    """The LLM's loss on the answer tokens."""

    def forward(self, vlm: VLM, prompts: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Prompts [n, T, d_llm] -> summed NLL, and how many tokens it sums."""
        nll, _ = vlm.splice.token_nll(prompts, batch.encoded, packed=batch.packs is not None)
        return nll.sum(), len(nll)

    def weight(self, batch: Batch, visual: int) -> float:
        """What the sum is divided by: the answer tokens of all samples."""
        return float(batch.answer_tokens)


class WordObjective(Objective):
    """Classification of each prompt among the words of the training captions, by distance in the embedding space.

    With word embeddings e_v of variance D around their mean, prompt p has the logits −|p − e_v|² · SHARPNESS / (2 D):
    a Gaussian around every word. PULL · |p − e|² / D is added, so that a sure prompt lies on its word and an unsure
    one between its candidates.
    """

    embeddings: Tensor
    offsets: Tensor
    spread: Tensor

    def __init__(self, vlm: VLM, captions: Iterable[str]):
        super().__init__()
        self.tokenizer: Any = vlm.llm.tokenizer
        self.filler = self._ids("\n")[0]
        vocabulary = sorted({token for caption in captions for token in self._ids(" " + caption)} | {self.filler})
        self.rows = {token: row for row, token in enumerate(vocabulary)}
        with torch.no_grad():
            embeddings = vlm.llm.embed(torch.tensor(vocabulary, device=vlm.device)).float()
        variance = (embeddings - embeddings.mean(dim=0)).square().sum(dim=1).mean()
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("offsets", embeddings.square().sum(dim=1) / 2)
        self.register_buffer("spread", variance)

    def forward(self, vlm: VLM, prompts: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Prompts [n, T, d_llm] -> summed weighted loss, and how many prompts it sums."""
        rows, captions = _of_one_image(batch)
        prompts = prompts[rows]
        targets, weights = self._targets(captions, prompts.shape[1])
        targets, weights = targets.flatten().to(prompts.device), weights.flatten().to(prompts.device)
        prompts = prompts.float().flatten(0, 1)
        logits = (prompts @ self.embeddings.T - self.offsets) * (SHARPNESS / self.spread)
        nll = F.cross_entropy(logits, targets, reduction="none")
        distance = (prompts - self.embeddings[targets]).square().sum(dim=-1) / self.spread
        return ((nll + PULL * distance) * weights).sum(), len(targets)

    def weight(self, batch: Batch, visual: int) -> float:
        """What the sum is divided by: the weights of all captions' prompts."""
        return float(self._targets(_of_one_image(batch)[1], visual)[1].sum())

    def _targets(self, captions: Sequence[str], visual: int) -> tuple[Tensor, Tensor]:
        """Rows of the vocabulary and weights, both [B, visual]."""
        targets = torch.full((len(captions), visual), self.rows[self.filler])
        weights = torch.full((len(captions), visual), FILLER_WEIGHT)
        half = (visual + 1) // 2
        for index, caption in enumerate(captions):
            rows = torch.tensor([self.rows.get(token, -1) for token in self._ids(" " + caption)])
            for places, found in (
                (slice(0, min(half, len(rows))), rows[:half]),
                (slice(max(half, visual - len(rows)), visual), rows[max(0, len(rows) - (visual - half)) :]),
            ):
                targets[index, places] = found.clamp(min=0)
                weights[index, places] = (found >= 0).float()  # a word outside the training captions has no row
        return targets, weights

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


def _of_one_image(batch: Batch) -> tuple[list[int], list[str]]:
    """What is said about samples of one image, and the places of these images; not where nothing is said."""
    firsts = [0, *accumulate(text.images for text in batch.encoded)]
    alone = [row for row, text in enumerate(batch.encoded) if text.images == 1 and text.answers]
    return [firsts[row] for row in alone], [answer_of(batch.texts[row]) for row in alone]


OBJECTIVES: dict[str, Callable[[VLM, Iterable[str]], Objective]] = {
    "caption": lambda vlm, captions: CaptionObjective(),
    "words": WordObjective,
}


def build_objectives(names: Sequence[str], vlm: VLM, captions: Iterable[str]) -> dict[str, Objective]:
    """The named objectives; `captions` are those of the training data, taken only where they are needed."""
    return {name: OBJECTIVES[name](vlm, captions) for name in names}
