"""The memory of a stage's passes, by running them on shapes: forward, backward, validation.

What autograd keeps, what a backward pass makes on its way and when each is let go comes from the very code that trains,
for every family of models; nothing of it is written down here. What runs is `FakeTensorMode`, so it takes seconds.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vpgtrans import short_attention
from vpgtrans.isolation import Isolation
from vpgtrans.plan.ledger import Ledger
from vpgtrans.plan.skeleton import Rows, Skeleton, fill
from vpgtrans.training.config import Stage, TrainerConfig
from vpgtrans.training.features import FrozenFront, Level
from vpgtrans.training.fitting import fitted
from vpgtrans.training.parts import set_modes, set_trainable


@dataclass(frozen=True)
class Passes:
    """What is in memory beside weights, optimizer and earlier gradients, at the highest moment.

    Attributes:
        activations, logits: bytes. gradients: bytes that a micro-batch adds before it lets go of its activations.
    """

    activations: int
    logits: int
    gradients: int


class Trace:
    """One stage of a skeleton, ready to run on shapes. The skeleton is its own from then on."""

    def __init__(
        self, vlm: Skeleton, stage: Stage, *, level: Level, isolation: Isolation | None, trainer: TrainerConfig
    ):
        """
        Args:
            level: how far the frozen front reaches. isolation: of samples that share a row.
            trainer: its precision, and what it checkpoints.
        """
        self.vlm, self.stage, self.isolation = vlm, stage, isolation
        self.front = FrozenFront(vlm.vpg, level, dtype=torch.float32 if level == "pixels" else torch.bfloat16)
        self.trainer = trainer.model_copy(update={"compile": False})
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)  # the mean pixel is a real tensor
        set_trainable(vlm, stage)
        with self._fake:
            fill(vlm)

    def training(self, rows: Sequence[Rows]) -> Passes:
        """Of an update whose gradient is gathered over these rows, one after another."""
        self.vlm.train()
        set_modes(self.vlm, self.stage)
        with fitted(self.vlm, self.stage, self.trainer):
            return self._run(rows, backward=True)

    def validation(self, rows: Rows) -> Passes:
        """Of a pass without gradients."""
        self.vlm.eval()
        with torch.no_grad():
            return self._run([rows], backward=False)

    def frozen(self, pieces: int) -> Passes:
        """Of so many images' passes through the frozen front."""
        if self.front.level == "pixels":
            return Passes(0, 0, 0)
        size = self.vlm.vpg.encoder.config.image.size
        with self._counting() as ledger:
            levels = torch.zeros(pieces, 3, size, size, dtype=torch.uint8)
            self.front.of_levels(levels)
        return _passes(ledger)

    def _counting(self) -> AbstractContextManager[Ledger]:
        return _counting(self.vlm, self._fake, autocast=self.trainer.precision == "bf16-mixed")

    def _run(self, rows: Sequence[Rows], *, backward: bool) -> Passes:
        expected = []
        for each in rows:
            self.vlm.expect(each, isolation=self.isolation, fake=self._fake)
            expected.append((each, self.vlm.splice.segments))
        with self._counting() as ledger:
            for each, segments in expected:
                self.vlm.splice.rows, self.vlm.splice.segments = each, segments
                ledger.places, ledger.whole = each.targets, len(set(each.lengths)) == 1
                self._one(each, backward=backward)
            for parameter in self.vlm.parameters():
                parameter.grad = None
        return _passes(ledger)

    def _one(self, rows: Rows, *, backward: bool) -> None:
        prompts = self.vlm.prompts_from(self.front.rest(self._inputs(rows.pieces)))
        nll, _ = self.vlm.splice.token_nll(prompts, [], packed=rows.packed)
        total = nll.sum()
        if backward and total.requires_grad:
            total.backward()

    def _inputs(self, pieces: int) -> Tensor:
        """As the front hands them on."""
        vpg, level = self.vlm.vpg, self.front.level
        side = vpg.encoder.config.image.size
        if level == "pixels":
            return torch.zeros(pieces, 3, side, side, dtype=torch.uint8)
        shape = (vpg.encoder.patches, vpg.encoder.width) if level == "patches" else (vpg.tokens, vpg.width)
        return torch.zeros(pieces, *shape, dtype=self.front.dtype)


@contextmanager
def _counting(vlm: Skeleton, fake: FakeTensorMode, *, autocast: bool) -> Iterator[Ledger]:
    """A ledger over a fake mode, with what must not outlive it thrown away."""
    ledger = Ledger(vlm, vocabulary=vlm.llm.fingerprint.vocabulary)
    short_attention.forget()
    try:
        with fake, ledger, ledger.gradients(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            yield ledger
    finally:
        short_attention.forget()


def _passes(ledger: Ledger) -> Passes:
    peak = ledger.peak
    return Passes(peak["activations"], peak["logits"], peak["gradients"])
