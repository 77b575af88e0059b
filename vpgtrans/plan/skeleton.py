"""A VLM of shapes: all parts as a run would join them, with tensors that hold nothing."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vpgtrans.config import ProjectorConfig, ResolutionConfig
from vpgtrans.fingerprint import Fingerprint
from vpgtrans.isolation import Isolation
from vpgtrans.llm import LanguageModel
from vpgtrans.projector import Projector
from vpgtrans.segments import Segments
from vpgtrans.token_loss import After
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM, Splice, Spliced


@dataclass(frozen=True)
class Rows:
    """What goes through the LLM at once.

    Attributes:
        lengths: tokens of each sample, visual ones included. targets: tokens of all that the loss counts. pieces:
        images of all, or their tiles. packed: whether they share one row.
    """

    lengths: Sequence[int]
    targets: int
    pieces: int
    packed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the batch: rows and the places in each, of which the last token of a text takes none."""
        inputs = [length - 1 for length in self.lengths]
        return (1, sum(inputs)) if self.packed else (len(inputs), max(inputs))


class _Shapes(Splice):
    """A splice that joins rows without words: `rows` says how many tokens they have."""

    def __init__(self, llm: LanguageModel):
        self.llm = llm
        self.both_ways = False
        self.isolation: Isolation | None = None
        self.unpadded = False
        self.rows = Rows([1], 0, 0)
        self.segments: Segments | None = None

    @cached_property
    def _after_head(self) -> After:
        """Whatever a family does to its logits takes no memory: it is done in place."""
        return After()

    def lay_out(self, *_: Any, **__: Any) -> None:
        """There is no prompter."""

    def join(self, prompts: Tensor, texts: Sequence[Any], *, packed: bool = False) -> Spliced:
        """As a real one: words looked up, visual prompts put in their places."""
        tokens = torch.zeros(self.rows.shape, dtype=torch.long)
        visual = torch.zeros(self.rows.shape, dtype=torch.bool)
        words = self.llm.embed(tokens)
        embeddings = words.masked_scatter(visual[..., None], prompts.to(words.dtype)) if self.rows.pieces else words
        targets = torch.zeros(self.rows.targets, dtype=torch.long)
        return Spliced(embeddings, visual, targets, targets, tokens, self.segments)


class Skeleton(VLM):
    """A VLM without weights, words and tokenizer: what trains and what runs are a real one's."""

    splice: _Shapes

    def __init__(self, vpg: VPG, projector: Projector, llm: LanguageModel):
        nn.Module.__init__(self)
        self.vpg, self.projector, self.llm = vpg, projector, llm
        self.language_model: nn.Module = llm.model
        self.splice = _Shapes(llm)

    def set_resolution(self, stated: ResolutionConfig) -> None:
        self.vpg.set_resolution(stated)

    def expect(self, rows: Rows, *, isolation: Isolation | None, fake: FakeTensorMode | None = None) -> None:
        """Have these rows joined next; isolation: how samples of one row are kept apart."""
        self.splice.rows = rows
        self.splice.isolation = isolation if rows.packed else None
        self.splice.segments = None
        if rows.packed and isolation is not None:
            segments = Segments.in_a_row([length - 1 for length in rows.lengths])
            self.splice.segments = segments if fake is None else _faked(segments, fake)


def _faked(segments: Segments, fake: FakeTensorMode) -> Segments:
    """The same places in tensors of a fake mode: they are counted for real before, since that depends on values."""
    of = fake.from_tensor
    groups = [replace(group, index=of(group.index), real=of(group.real)) for group in segments.groups]
    known = {"positions": of(segments.positions), "back": of(segments.back), "borders": of(segments.borders)}
    segments.__dict__.update(known, groups=groups)
    return segments


def skeleton(vpg: VPG, projector: ProjectorConfig, config: Any, *, dtype: torch.dtype) -> Skeleton:
    """Join a VPG (on the meta device), a new projector, and an LLM of a `transformers` config; all on meta.

    dtype: of the LLM.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    table = model.get_input_embeddings().weight
    fingerprint = Fingerprint("", None, type(model).__name__, table.shape[1], 0, table.shape[0], "", None)
    llm = LanguageModel(model, None, "", fingerprint)
    with torch.device("meta"):
        joined = Projector(projector, vpg.width, llm.width)
    return Skeleton(copy.deepcopy(vpg).eval(), joined.eval(), llm)


def fill(module: nn.Module, *, dtype: torch.dtype | None = None) -> None:
    """Give a module's tensors anew, as the fake mode around it makes them; tied ones stay tied.

    dtype: of the floating ones, if another.
    """
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=kind)
                    as_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if as_parameter else empty
                table[name] = made[id(tensor)]  # type: ignore[assignment]
