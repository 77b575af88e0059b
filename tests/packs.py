"""Conversations with and without images for tests of packing, and what is measured of them in a row.

Not a test file: `test_isolation.py` and `benchmarks/isolation.py` take them from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import sharp_llm
from torch import Tensor, nn

from vpgtrans.config import PromptConfig
from vpgtrans.isolation import Isolation
from vpgtrans.llm import LanguageModel, block_linears, open_llm
from vpgtrans.prompts import Text, Turn, count_images
from vpgtrans.segments import Segments
from vpgtrans.vlm import Splice

VISUAL_TOKENS = 3
TEXTS: tuple[Text, ...] = (
    "a cat sleeps on a sofa",
    (Turn("user", "Where is the dog?"), Turn("assistant", "Under the table.")),
    (
        Turn("user", "<image><image>\nWhich clock is late?"),
        Turn("assistant", "The second."),
        Turn("user", "By how much?"),
        Turn("assistant", "By a quarter of an hour."),
    ),
    "x",
    (Turn("assistant", "A flag <image> and a red sun <image> at sea."),),
)
"""One image, none, two in a question, one with a short caption, two inside a document."""

WINDOW = 6
"""Of the families with a sliding window: shorter than most samples."""
FAMILIES: dict[str, tuple[str, dict[str, int]]] = {
    **{name: (name, {}) for name in ("llama", "qwen3", "gemma3", "opt", "opt-project-in", "gpt2", "phi3")},
    **{f"{name}, window": (name, {"sliding_window": WINDOW}) for name in ("mistral", "phi3", "gemma3")},
}
"""Name -> tiny family and what is changed in its config."""


def open_family(name: str, directory: Path) -> LanguageModel:
    """The tiny LLM of an entry of `FAMILIES`, in float32."""
    family, changes = FAMILIES[name]
    return open_llm(str(sharp_llm(family, directory, **changes)), dtype=torch.float32)


def splice_of(llm: LanguageModel, *, both_ways: bool = False, visual_tokens: int = VISUAL_TOKENS) -> Splice:
    """Conversations in the plain format, which every tokenizer has."""
    attention = "bidirectional" if both_ways else "causal"
    return Splice(llm, PromptConfig(format="plain", image_attention=attention), visual_tokens=visual_tokens)


def random_prompts(splice: Splice, texts: Sequence[Text] = TEXTS, *, seed: int = 1) -> Tensor:
    """Visual prompts [n, T, d] of all images of the texts, as large as words."""
    images, generator = sum(count_images(text) for text in texts), torch.Generator().manual_seed(seed)
    size = (images, splice.prompter.visual_tokens, splice.llm.width)
    return splice.llm.word_rms * torch.randn(size, generator=generator)


def alone(splice: Splice, prompts: Tensor, texts: Sequence[Text] = TEXTS) -> list[Tensor]:
    """NLL of each text's answer tokens when nothing else is in the batch, through the model's own attention."""
    found, first = [], 0
    for text in texts:
        images = count_images(text)
        found.append(splice.token_nll(prompts[first : first + images], [text])[0])
        first += images
    return found


@dataclass
class Trained:
    """A projector (on features [n, T, 5]) and a LoRA adapter on an LLM."""

    splice: Splice
    projector: nn.Linear
    features: Tensor
    texts: Sequence[Text]

    @property
    def parameters(self) -> dict[str, Tensor]:
        adapter = {name: each for name, each in self.splice.llm.model.named_parameters() if each.requires_grad}
        return {"features": self.features, "weight": self.projector.weight, "bias": self.projector.bias, **adapter}

    def gradients(self, *, packed: bool) -> dict[str, Tensor]:
        """Of the summed NLL of all answers, by everything that trains and by the features."""
        nll, _ = self.splice.token_nll(self.projector(self.features), self.texts, packed=packed)
        named = self.parameters
        return dict(zip(named, torch.autograd.grad(nll.sum(), list(named.values())), strict=True))


def trained(splice: Splice, texts: Sequence[Text] = TEXTS) -> Trained:
    """The splice's LLM gets an adapter, in place; as if some updates were behind it: nothing is zero."""
    llm, generator = splice.llm, torch.Generator().manual_seed(2)
    llm.model = get_peft_model(llm.model, LoraConfig(r=2, target_modules=block_linears(llm.model)))
    llm.model.eval()
    with torch.no_grad():
        for parameter in (each for each in llm.model.parameters() if each.requires_grad):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    projector = nn.Linear(5, llm.width)
    images = sum(count_images(text) for text in texts)
    features = torch.randn(images, splice.prompter.visual_tokens, 5, generator=generator)
    with torch.no_grad():
        projector.weight.copy_(0.5 * llm.word_rms * torch.randn(projector.weight.shape, generator=generator))
    return Trained(splice, projector, features.requires_grad_(), texts)


def gradient_error(packed: dict[str, Tensor], padded: dict[str, Tensor]) -> float:
    """Largest difference, over the largest gradient of the same tensor."""
    return max(((packed[name] - value).abs().max() / value.abs().max()).item() for name, value in padded.items())


@torch.no_grad()
def neighbour_effect(splice: Splice, isolation: Isolation, prompts: Tensor, texts: Sequence[Text] = TEXTS) -> float:
    """How much a sample's logits change at most when every other token of its row is another; exactly."""
    batch = splice.join(prompts, texts, packed=True)
    assert batch.segments is not None
    model = splice.llm.model
    before = isolation.run(model, batch.embeddings, batch.segments).logits[0]
    generator, largest = torch.Generator().manual_seed(3), 0.0
    for own in ranges(batch.segments):
        others = (splice.llm.word_rms * torch.randn(batch.embeddings.shape, generator=generator)).to(batch.embeddings)
        others[:, own] = batch.embeddings[:, own]
        after = isolation.run(model, others, batch.segments).logits[0]
        largest = max(largest, (after[own] - before[own]).abs().max().item())
    return largest


def ranges(segments: Segments) -> list[slice]:
    """Where each sample stands in its flattened batch."""
    return [slice(start, start + length) for start, length in zip(segments.starts, segments.lengths, strict=True)]
