"""The splice: visual prompts between the words of a prompt, through the LLM, to a loss or to text.

    [bos] template before <image> | visual prompts [T] | template after <image> | answer [end]

The loss is on the answer and the end token only, and the LLM's head runs at those positions only: a vocabulary of
262,144 words times every position would own the memory and most of the time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vpgtrans.config import PromptConfig
from vpgtrans.errors import TransferError
from vpgtrans.llm import LanguageModel
from vpgtrans.projector import Projector
from vpgtrans.token_loss import token_nll
from vpgtrans.vision.preprocess import open_image
from vpgtrans.vision.vpg import VPG

_ANCHORS = ("\n", ":", "0")
"""What a text may stand behind to be tokenised as the middle of another; the first that does not merge with it."""


@dataclass
class Spliced:
    """A batch of embedded sequences, padded on the right.

    Attributes:
        embeddings: [B, L, d_llm]. attention_mask: [B, L], 1 where a sequence is.
        predicts: [B, L] bool, the positions whose next token is part of an answer.
        targets: [n], those next tokens, row by row. rows: [n], the row each belongs to.
    """

    embeddings: Tensor
    attention_mask: Tensor
    predicts: Tensor
    targets: Tensor
    rows: Tensor


class Splice:
    """Visual prompts among the words of one LLM's prompt. Knows nothing of images."""

    def __init__(self, llm: LanguageModel, prompt: PromptConfig):
        self.llm = llm
        self.prompt = prompt

    def join(self, prompts: Tensor, answers: Sequence[str]) -> Spliced:
        """Visual prompts [B, T, d_llm] and B answers -> one right-padded batch."""
        before = self.context(prompts, self.prompt.template)
        encoded = [self._answer_ids(answer) for answer in answers]
        longest = max(len(ids) for ids in encoded)
        tokens = torch.zeros(len(encoded), longest, dtype=torch.long)
        real = torch.zeros(len(encoded), longest, dtype=torch.bool)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = torch.tensor(ids)
            real[row, : len(ids)] = True
        tokens, real = tokens.to(prompts.device), real.to(prompts.device)
        ones = real.new_ones(before.shape[:2])
        return Spliced(
            # The last answer token is never an input: nothing is predicted after it.
            embeddings=torch.cat([before, self.llm.embed(tokens[:, :-1])], dim=1),
            attention_mask=torch.cat([ones, real[:, 1:]], dim=1).long(),
            predicts=torch.cat([torch.zeros_like(ones[:, 1:]), real], dim=1),
            targets=tokens[real],
            rows=torch.nonzero(real)[:, 0],
        )

    def context(self, prompts: Tensor, template: str) -> Tensor:
        """What stands before an answer, embedded: [B, T, d] -> [B, words + T, d] in the LLM's dtype."""
        before, after = template.split("<image>", 1)
        first = self._ids(before)
        bos = self.llm.tokenizer.bos_token_id
        if bos is not None and first[:1] != [bos]:  # chat templates may begin with it
            first = [bos, *first]
        words = [
            self.llm.embed(torch.tensor(ids, dtype=torch.long, device=prompts.device)).expand(len(prompts), -1, -1)
            for ids in (first, self._later_ids(after))
        ]
        return torch.cat([words[0], prompts.to(words[0].dtype), words[1]], dim=1)

    def token_nll(self, prompts: Tensor, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every answer token.

        Args:
            prompts: [B, T, d_llm]. answers: B texts.

        Returns:
            nll [n] in float32 nats and rows [n], the sample each token belongs to.
        """
        batch = self.join(prompts, answers)
        with head_only_at(self.llm.model, batch.predicts):
            logits = self.llm.model(
                inputs_embeds=batch.embeddings, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        return token_nll(logits[0], batch.targets), batch.rows

    @torch.no_grad()
    def caption_nll(self, prompts: Tensor, captions: Sequence[str], *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Summed NLL [B] and token count [B] of each caption behind its prompts [B, T, d_llm]."""
        device = self.llm.model.get_input_embeddings().weight.device
        sums, counts = torch.zeros(len(captions)), torch.zeros(len(captions))
        for start in range(0, len(captions), batch_size):
            chunk = slice(start, start + batch_size)
            nll, rows = self.token_nll(prompts[chunk].to(device), captions[chunk])
            sums[chunk].index_add_(0, rows.cpu(), nll.cpu())
            counts[chunk].index_add_(0, rows.cpu(), torch.ones(len(nll)))
        return sums, counts

    @torch.no_grad()
    def write(self, prompts: Tensor, template: str, *, max_new_tokens: int, **options: Any) -> list[str]:
        """Text after the template, for prompts [B, T, d_llm]; greedy unless `options` say otherwise."""
        embeddings = self.context(prompts, template)
        tokenizer = self.llm.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Every sequence of the batch has the same length, so nothing is padded.
        written = self.llm.model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
            **{"do_sample": False, **options},
        )
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]

    def answer_length(self, answer: str) -> int:
        """Tokens that the loss counts for an answer, the end token included."""
        return len(self._answer_ids(answer))

    def _answer_ids(self, answer: str) -> list[int]:
        # After a template like "Name:" a word starts with a space, which belongs to its token.
        apart = "" if self.prompt.template[-1:].isspace() or self.prompt.template.endswith("<image>") else " "
        end = self.llm.tokenizer.eos_token_id
        return self._later_ids(apart + answer) + ([end] if self.prompt.end and end is not None else [])

    def _ids(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _later_ids(self, text: str) -> list[int]:
        """Ids of a text that stands behind something: without the space that SentencePiece puts before a first word."""
        behind = self._ids_behind_anchor(text) if text and self._adds_prefix else None
        return self._ids(text) if behind is None else behind

    def _ids_behind_anchor(self, text: str) -> list[int] | None:
        """None where every anchor merges with the text or vanishes."""
        for anchor in _ANCHORS:
            head, whole = self._ids(anchor), self._ids(anchor + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return None

    @cached_property
    def _adds_prefix(self) -> bool:
        """Whether a word at the start of a text has other ids than inside one; where not, texts are taken alone."""
        behind = self._ids_behind_anchor("a")
        return behind is not None and behind != self._ids("a")


class VLM(nn.Module):
    """A visual prompt generator, a projector and an LLM, joined by a prompt."""

    def __init__(self, vpg: VPG, projector: Projector, llm: LanguageModel, *, prompt: PromptConfig):
        super().__init__()
        if vpg.width != projector.width_in:
            raise TransferError(
                f"the VPG gives tokens of width {vpg.width}, but the projector takes {projector.width_in}: "
                "they do not belong together"
            )
        if projector.width_out != llm.width:
            raise TransferError(
                f"the projector gives prompts of width {projector.width_out}, but {llm.reference} embeds in "
                f"{llm.width}: initialise a projector for this LLM first (`vpgtrans transfer`)"
            )
        self.vpg = vpg
        self.projector = projector
        self.language_model: nn.Module = llm.model
        self.llm = llm
        self.prompt = prompt
        self.splice = Splice(llm, prompt)

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def prompts_from(self, visual_tokens: Tensor) -> Tensor:
        """Visual tokens [B, T, d_vpg] -> visual prompts [B, T, d_llm]."""
        return self.projector(visual_tokens)

    def visual_tokens(self, images: Sequence[Image.Image | str | Path]) -> Tensor:
        """Images -> visual tokens [B, T, d_vpg]."""
        pixels = torch.stack([self.vpg.transform(open_image(image)) for image in images])
        first = next(self.vpg.parameters())
        return self.vpg(pixels.to(first.device, first.dtype))

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[Image.Image | str | Path],
        prompt: str | None = None,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        **options: Any,
    ) -> list[str]:
        """Text for each image, greedy unless `options` (of transformers' `generate`) say otherwise.

        Args:
            images: PIL images or paths.
            prompt: a template with `<image>`, or a text that is put after the image; the trained template if None.

        Raises:
            DataError: an image can't be read.
        """
        template = self.prompt.template if prompt is None else prompt if "<image>" in prompt else f"<image>{prompt}"
        texts: list[str] = []
        for start in range(0, len(images), batch_size):
            tokens = self.visual_tokens(images[start : start + batch_size])
            prompts = self.prompts_from(tokens.to(next(self.projector.parameters()).dtype))
            texts += self.splice.write(prompts, template, max_new_tokens=max_new_tokens, **options)
        return texts


@contextmanager
def head_only_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within the block, `model`'s output head runs only where `positions [B, L]` is true: logits are [1, n, V].

    What the model does to its logits afterwards (soft caps, scaling) still applies, which calling the head by hand
    would miss.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][positions][None], *arguments[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
