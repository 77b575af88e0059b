"""The splice: visual prompts among the words of a conversation, through the LLM, to a loss or to text.

    [bos] words | visual prompts [T] of an image | words | answer [end] | words | answer [end] …

A batch is a row a sample, padded; or one row of many samples that don't see each other (`isolation`): no padding.

`prompts` says which words these are. The loss is on the answers and the tokens that end them, and the LLM's head runs
at those positions only: a vocabulary of 262,144 words times every position would own the memory and most of the time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vpgtrans.config import PromptConfig, ResolutionConfig
from vpgtrans.errors import DataError, RecipeError, TransferError
from vpgtrans.isolation import Backend, Isolation, in_eval_mode, isolate, writing
from vpgtrans.layout import Layout, Layouts, Size
from vpgtrans.llm import LanguageModel, word_ids
from vpgtrans.projector import Projector
from vpgtrans.prompts import IMAGE, VISUAL, Encoded, Prompter, Text, Turn
from vpgtrans.segments import Segments
from vpgtrans.token_loss import After, head_nll, token_nll
from vpgtrans.vision.preprocess import open_image
from vpgtrans.vision.vpg import VPG, in_turns, of_pieces

Picture = Image.Image | str | Path


@dataclass
class Spliced:
    """A batch of embedded sequences: padded on the right, or packed (B is 1).

    Attributes:
        embeddings: [B, L, d_llm]. predicts: [B, L] bool, the positions whose next token is part of an answer.
        targets: [n], those next tokens, in order. rows: [n], the text each belongs to.
        attention_mask: [B, L], 1 where a sequence is. segments: where each is; with it the mask is not used.
    """

    embeddings: Tensor
    predicts: Tensor
    targets: Tensor
    rows: Tensor
    attention_mask: Tensor
    segments: Segments | None


class Splice:
    """Visual prompts among the words of one LLM's prompt. Knows nothing of images."""

    def __init__(self, llm: LanguageModel, prompt: PromptConfig, *, visual_tokens: int, layouts: Layouts | None = None):
        """visual_tokens: of an image; or layouts, where they depend on its size."""
        self.llm = llm
        self.lay_out(prompt, visual_tokens=visual_tokens, layouts=layouts)
        self.both_ways = prompt.image_attention == "bidirectional"
        self.isolation: Isolation | None = None
        """How samples that share a row are kept apart, once it is chosen."""
        self.unpadded = False
        """Whether all of a batch share a row, see `unpad`."""

    def lay_out(self, prompt: PromptConfig, *, visual_tokens: int, layouts: Layouts | None) -> None:
        """From now on leave as many places for an image; as `__init__`.

        Raises:
            RecipeError: as `Prompter`.
        """
        self.prompter = Prompter(
            self.llm.tokenizer, prompt, visual_tokens=visual_tokens, layouts=layouts, limit=self.llm.max_tokens
        )

    def isolate(self, backend: Backend | Literal["auto"] = "auto", *, longest: int | None = None) -> Isolation:
        """Choose how samples that share a row are kept apart, see `isolation.isolate`.

        longest: tokens of a sample that shares a row, if the prompt allows as many; None: none does.
        """
        if longest is not None and self.prompter.max_tokens is not None:
            longest = min(longest, self.prompter.max_tokens)
        self.isolation = isolate(self.llm, backend, longest=longest, both_ways=self.both_ways)
        return self.isolation

    def unpad(self, backend: Backend | Literal["auto"] = "auto") -> None:
        """From now on put the texts of a batch behind each other in one row, which leaves no padding to compute.

        Where the LLM knows no way to keep them apart in it, or none but a mask of the whole row, they stay padded.
        """
        try:
            found = isolate(self.llm, backend, both_ways=self.both_ways)
        except RecipeError:
            return
        if found.maskless:
            self.isolation, self.unpadded = found, True

    def join(self, prompts: Tensor, texts: Sequence[Text | Encoded], *, packed: bool = False) -> Spliced:
        """Visual prompts [n, T, d_llm] of all images of some conversations, in order -> one batch.

        Of images in several pieces or of native size they are [pieces, T, d_llm] or [m, d_llm].
        packed: all of them in one row, see `isolate`; else a row each.
        """
        encoded = [text if isinstance(text, Encoded) else self.prompter.encode(text) for text in texts]
        lengths = [len(text) for text in encoded]
        width = sum(lengths) if packed else max(lengths)
        starts = [0, *accumulate(lengths[:-1])] if packed else [row * width for row in range(len(encoded))]
        ids = np.zeros(width if packed else width * len(encoded), dtype=np.int64)
        answer = np.zeros(ids.shape, dtype=bool)
        # The last token of a text is never an input: nothing is predicted after it.
        taken = np.zeros(ids.shape, dtype=bool)
        of = np.zeros(ids.shape, dtype=np.int64)
        for row, (text, start) in enumerate(zip(encoded, starts, strict=True)):
            own = slice(start, start + len(text))
            ids[own], answer[own], of[own] = text.ids, text.answer, row
            taken[start : start + len(text) - 1] = True
        predicts = np.append(answer[1:], False) & taken
        targets = np.append(ids[1:], 0)[predicts]
        tokens, real, predicted = (torch.from_numpy(each).view(-1, width) for each in (ids, taken, predicts))
        embeddings = self._embed(tokens.to(self.device), prompts)
        if packed:
            embeddings, predicted = embeddings[:, real[0].to(self.device)], predicted[:, real[0]]
        else:
            embeddings, real, predicted = embeddings[:, :-1], real[:, :-1], predicted[:, :-1]
        return Spliced(
            embeddings=embeddings,
            predicts=predicted.to(self.device),
            targets=torch.from_numpy(targets).to(self.device),
            rows=torch.from_numpy(of[predicts]).to(self.device),
            attention_mask=real.long().to(self.device),
            segments=self._segments([text.ids[:-1] for text in encoded], width - 1, packed=packed),
        )

    def _segments(
        self, texts: Sequence[np.ndarray], width: int, *, packed: bool, left: bool = False
    ) -> Segments | None:
        """Where texts [L] stand: in one row, or padded to `width` on the right (or left). None: a mask says enough."""
        if not packed and not self.both_ways:
            return None
        lengths = [len(ids) for ids in texts]
        if packed:
            starts, shape = [0, *accumulate(lengths[:-1])], (1, sum(lengths))
        else:
            starts = [row * width + (width - lengths[row] if left else 0) for row in range(len(texts))]
            shape = (len(texts), width)
        spans: list[tuple[int, int]] = []
        if self.both_ways:
            for ids, start in zip(texts, starts, strict=True):
                spans += [(start + first, start + last) for first, last in self._images(ids)]
        return Segments(shape, starts, lengths, spans, self.device)

    def _images(self, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """Where the visual tokens of each image begin and end."""
        places, size = np.flatnonzero(ids == VISUAL), self.prompter.visual_tokens
        for image in range(0, len(places), size):
            yield int(places[image]), int(places[min(image + size, len(places)) - 1]) + 1

    def _embed(self, tokens: Tensor, prompts: Tensor) -> Tensor:
        """Ids [B, L], `VISUAL` where prompts [n, T, d] or [m, d] go in order -> [B, L, d] in the LLM's dtype.

        Raises:
            ValueError: there are more or fewer places than visual tokens; a wrong image would go to every later row.
        """
        if (places := int((tokens == VISUAL).sum())) != prompts.shape[:-1].numel():
            raise ValueError(f"visual prompts {list(prompts.shape[:-1])} for {places} places")
        visual = tokens == VISUAL
        words = self.llm.embed(tokens.masked_fill(visual, 0))
        if not prompts.numel():
            return words
        return words.masked_scatter(visual[..., None], prompts.to(words.dtype))

    @property
    def device(self) -> torch.device:
        return self.llm.model.get_input_embeddings().weight.device

    def token_nll(
        self, prompts: Tensor, texts: Sequence[Text | Encoded], *, packed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every answer token.

        Args:
            prompts: [n, T, d_llm], the images of all conversations in order. texts: B conversations or captions.
            packed: put all of them into one row. It changes nothing but the time that it takes.

        Returns:
            nll [m] in float32 nats and rows [m], the conversation each token belongs to.
        """
        packed = packed or self.unpadded
        batch = self.join(prompts, texts, packed=packed)
        model = self.llm.model
        isolation = self.isolation
        if batch.segments is not None and isolation is None:
            isolation = self.isolate(longest=self.prompter.max_tokens if packed else None)

        def run() -> Any:
            if isolation is not None and batch.segments is not None:
                return isolation.run(model, batch.embeddings, batch.segments)
            mask = batch.attention_mask
            return model(inputs_embeds=batch.embeddings, attention_mask=mask, use_cache=False)

        head = model.get_output_embeddings()
        after = self._after_head if type(head) is nn.Linear and not head.weight.requires_grad else None
        if after is not None:
            with nll_in_head(head, batch.predicts, batch.targets, after) as found:
                run()
            return found[0], batch.rows
        with head_only_at(model, batch.predicts):
            logits = run().logits
        return token_nll(logits[0], batch.targets), batch.rows

    @cached_property
    def _after_head(self) -> After | None:
        return after_head(self.llm)

    @torch.no_grad()
    def caption_nll(self, prompts: Tensor, captions: Sequence[Text], *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Summed NLL [B] and token count [B] of texts of one image each, behind its prompts [B, T, d_llm]."""
        sums, counts = torch.zeros(len(captions)), torch.zeros(len(captions))
        for start in range(0, len(captions), batch_size):
            chunk = slice(start, start + batch_size)
            nll, rows = self.token_nll(prompts[chunk].to(self.device), captions[chunk])
            sums[chunk].index_add_(0, rows.cpu(), nll.cpu())
            counts[chunk].index_add_(0, rows.cpu(), torch.ones(len(nll)))
        return sums, counts

    @torch.no_grad()
    def write(self, prompts: Tensor, before: Sequence[np.ndarray], *, max_new_tokens: int, **options: Any) -> list[str]:
        """The next words of each of B texts; greedy unless `options` say otherwise.

        Args:
            prompts: [n, T, d_llm] of all their images in order. before: ids [L] of what stands before each answer.
        """
        tokenizer = self.llm.tokenizer
        written = self._generate(prompts, before, max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]

    @torch.no_grad()
    def first_logits(self, prompts: Tensor, before: Sequence[np.ndarray]) -> Tensor:
        """What `write` chooses its first word by: logits [B, V] in float32."""
        said = self._generate(
            prompts, before, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return said.logits[0].float()

    def _generate(self, prompts: Tensor, before: Sequence[np.ndarray], **options: Any) -> Any:
        """`generate` of the LLM behind texts that hold visual prompts."""
        longest = max(len(ids) for ids in before)
        tokens = torch.zeros(len(before), longest, dtype=torch.long)
        real = torch.zeros(len(before), longest, dtype=torch.long)
        for row, ids in enumerate(before):  # padded on the left: what is written goes on from the right
            tokens[row, longest - len(ids) :] = torch.from_numpy(ids)
            real[row, longest - len(ids) :] = 1
        embeddings = self._embed(tokens.to(self.device), prompts)
        tokenizer = self.llm.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        segments = self._segments(before, longest, packed=False, left=True)
        if segments is not None:
            self.isolation = self.isolation or self.isolate()  # refuses an LLM that can't
        with nullcontext() if segments is None else writing(self.llm.model, segments):
            return self.llm.model.generate(
                inputs_embeds=embeddings,
                attention_mask=real.to(self.device),
                pad_token_id=padding,
                eos_token_id=self.prompter.ends or None,
                **options,
            )


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
        self.splice = Splice(llm, prompt, visual_tokens=vpg.tokens, layouts=vpg.layouts)

    def set_resolution(self, stated: ResolutionConfig) -> None:
        """See images as `VPG.set_resolution` says, and leave as many places for them."""
        self.vpg.set_resolution(stated)
        self.splice.lay_out(self.prompt, visual_tokens=self.vpg.tokens, layouts=self.vpg.layouts)

    def see_squares(self) -> None:
        """See every image as one square from now on: images of any sizes then stand in for each other."""
        if self.vpg.layouts is not None:
            self.set_resolution(ResolutionConfig(fit=self.vpg.encoder.config.image.whole or "squash"))

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def prompts_from(self, visual_tokens: Tensor) -> Tensor:
        """Visual tokens [B, T, d_vpg] -> visual prompts [B, T, d_llm]."""
        return self.projector(visual_tokens)

    def visual_tokens(self, images: Sequence[Picture], layouts: Sequence[Layout] = ()) -> Tensor:
        """Images -> visual tokens [B, T, d_vpg]; [pieces, T, d_vpg] or [m, d_vpg] where there are layouts.

        layouts: of the images, as in the ids that they go among; by their sizes if none are given.
        """
        opened = [open_image(image) for image in images]
        pieces = self.vpg.pieces(opened, layouts or self._laid_out(opened))
        first = next(self.vpg.parameters())

        def compute(some: Tensor) -> Tensor:
            return self.vpg(self.vpg.transform.scaled(some.to(first.device)).to(first.dtype))

        return of_pieces(pieces, lambda alike: in_turns(alike, compute))

    def prompts(self, images: Sequence[Picture], layouts: Sequence[Layout] = ()) -> Tensor:
        """Images -> visual prompts [B, T, d_llm], or as `visual_tokens`; B may be 0."""
        if not images:
            return torch.empty(0, self.vpg.tokens, self.llm.width, device=self.device)
        tokens = self.visual_tokens(images, layouts)
        return self.prompts_from(tokens.to(next(self.projector.parameters()).dtype))

    def _laid_out(self, images: Sequence[Image.Image]) -> list[Layout]:
        layouts = self.vpg.layouts
        return [Layout(self.vpg.tokens) if layouts is None else layouts(image.size) for image in images]

    def question(self, prompt: str | None, sizes: Sequence[Size] = ()) -> np.ndarray:
        """Ids [L] of what stands before an answer about one image, see `generate`; `sizes` as for `Prompter.encode`."""
        prompter = self.splice.prompter
        if prompt is not None and prompt.count(IMAGE) > 1:
            raise DataError(f"{prompt!r} holds {IMAGE} {prompt.count(IMAGE)} times; right would be once, or not at all")
        if prompt is not None and IMAGE in prompt:
            return prompter.template(prompt, sizes)
        return prompter.question([Turn("user", f"{IMAGE}\n{prompt}" if prompt else IMAGE)], sizes)

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[Picture],
        prompt: str | None = None,
        *,
        max_new_tokens: int = 32,
        batch_size: int = 16,
        **options: Any,
    ) -> list[str]:
        """Text for each image, greedy unless `options` (of transformers' `generate`) say otherwise.

        Args:
            images: PIL images or paths.
            prompt: a question about each image, put as in training; or, with `<image>` in it, a text that is taken as
                it stands; None asks for a caption.

        Raises:
            DataError: an image can't be read.
        """
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt is one text for all images, not {type(prompt).__name__}")
        self.question(prompt, [(1, 1)])  # a wrong one is found before an image is opened
        texts: list[str] = []
        for start in range(0, len(images), batch_size):
            some = [open_image(image) for image in images[start : start + batch_size]]
            before = [self.question(prompt, [image.size]) for image in some]
            texts += self.splice.write(self.prompts(some), before, max_new_tokens=max_new_tokens, **options)
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


@contextmanager
def nll_in_head(head: nn.Linear, positions: Tensor, targets: Tensor, after: After) -> Iterator[list[Tensor]]:
    """Within the block a model's head gives no logits: it leaves the NLL [n] of the targets at positions [B, L] in the
    list. It does so itself, because that is where its weight is whole if it is sharded."""
    found: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        found.append(head_nll(hidden[positions], head.weight, head.bias, targets, after))
        return hidden.new_zeros(1, 1, 1)

    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        del head.forward


@torch.no_grad()
def after_head(llm: LanguageModel) -> After | None:
    """What a family does to its head's logits (soft caps, scaling), measured; None where it is something else."""
    head = llm.model.get_output_embeddings()
    values = torch.linspace(-100, 100, head.out_features, dtype=torch.float64, device=head.weight.device)
    values[:2] = torch.tensor([1e-4, 1e6])
    head.forward = lambda hidden: values[None, None]
    try:
        word = llm.embed(word_ids(llm.tokenizer, llm.fingerprint.vocabulary)[:1].to(head.weight.device))
        with in_eval_mode(llm.model):  # a draw of a dropout would shift those of the update
            found = llm.model(inputs_embeds=word[None], use_cache=False).logits.flatten().double()
    finally:
        del head.forward
    if found.shape != values.shape:
        return None
    slope = (found[0] / values[0]).item()
    cap = found[1].item()
    candidates = [After(), After(cap=cap), After(scale=slope), After(scale=slope, cap=cap)]
    return next((each for each in candidates if torch.allclose(each(values.clone()), found, rtol=1e-6)), None)
