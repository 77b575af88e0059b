"""The one LightningModule: it runs any stage, because stages are data.

One batch is one optimizer update. It is split into micro-batches or packs here, and every loss is divided by what the
*whole* batch (over all devices) holds: neither accumulation, nor packing, nor the number of devices changes an update.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from vpgtrans.training.config import Stage
from vpgtrans.training.features import FrozenFront
from vpgtrans.training.guard import Guard
from vpgtrans.training.objectives import Objective
from vpgtrans.training.optimizers import Kind, build_optimizer
from vpgtrans.training.parts import set_modes
from vpgtrans.training.samples import Batch
from vpgtrans.training.strategies import Together
from vpgtrans.vlm import VLM


class StageModule(L.LightningModule):
    """A VLM in one stage of its training.

    Args:
        objectives: name -> objective, the names are those of `stage.losses`.
        updates: length of the stage. done: updates that a resumed run has behind it. stream: seeds of the updates are
            drawn from (seed, stream), so that every stage has its own. guard: decides which updates are skipped.
    """

    def __init__(
        self,
        vlm: VLM,
        stage: Stage,
        *,
        front: FrozenFront,
        objectives: Mapping[str, Objective],
        updates: int,
        done: int = 0,
        seed: int = 0,
        stream: int = 0,
        optimizer: Kind = "adamw",
        guard: Guard | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.vlm = vlm
        self.stage = stage
        self.front = front
        self.objectives = dict(objectives)
        self.loss_weights: dict[str, float] = {name: stage.losses[name] for name in stage.losses}
        self._buffers_of_objectives = nn.ModuleDict(self.objectives)  # so that they move with the module
        self.updates = updates
        self.done = done
        self.seed = seed
        self.stream = stream
        self.optimizer = optimizer
        self.guard = guard or Guard(stage=stage.name)
        self.resume_optimizer: dict[str, Any] | None = None
        self.together = Together(self)
        """How devices train this together; another one is put here before training begins."""
        self.fit_blocks: Callable[[VLM], None] = lambda vlm: None
        """What is done to the blocks of what trains, see `fitting.fitted`."""
        self.last: dict[str, float] = {"loss": 0.0, "text_tokens": 0.0, "tokens": 0.0}
        """Figures of the last update: loss, lr, grad_norm, text_tokens, tokens."""

    def train(self, mode: bool = True) -> "StageModule":
        """Frozen parts stay in eval mode whatever the trainer asks for."""
        super().train(mode)
        if mode:
            set_modes(self.vlm, self.stage)
        else:
            self.vlm.eval()
        return self

    def rate_factor(self, update: int) -> float:
        """The learning rate of an update as a share of its peak: linear ramp, then constant or a cosine to zero."""
        ramp = math.ceil(self.stage.warmup_fraction * self.updates)
        if update < ramp:
            return (update + 1) / ramp
        if self.stage.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (update - ramp) / max(1, self.updates - ramp)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = build_optimizer(self.vlm, self.stage, self.optimizer)
        self.together.adopt(optimizer)
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update.

        Raises:
            TrainingError: the guard skipped too many updates; nothing was changed by this batch.
        """
        self.seed_dropout(self.done)
        optimizer = self.together.optimizer
        factor = self.rate_factor(self.done)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        losses = self._backward(batch)
        if losses is None:  # all of it is left out, on every device; whether too much is, is not decided here
            self.done += 1
            self.guard.last = None
            self.last |= {"text_tokens": 0.0, "tokens": 0.0, "left_out": 1.0}
            return
        self.together.add_up(parameters)
        norm = self.together.clip(parameters, self.stage.clip)
        self.done += 1
        self.last = {
            **losses,
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "grad_norm": norm.item(),
        }
        # Loss and norm are those of all devices, so that all decide alike.
        if problem := self.guard.problem(losses["loss"], self.last["grad_norm"]):
            self.together.clear(optimizer)
            ids = [name for names in self.from_all(batch.ids) for name in names]
            figures = {"loss": losses["loss"], "norm": self.last["grad_norm"]}
            self.guard.skip(problem, update=self.done, ids=ids, **figures)
            return
        self.together.step(optimizer)
        self.together.clear(optimizer)

    def seed_dropout(self, update: int) -> None:
        """Dropout of an update depends on (seed, stage, update) alone: a resumed run needs no generator state."""
        own = self.seed * 1_000_003 + self.stream * 10_007 + update + self.rank * 1_000_000_007
        torch.manual_seed(own % 2**63)

    def _backward(self, batch: Batch) -> dict[str, float] | None:
        """Accumulate the batch's gradient; returns the loss, its terms and the text tokens, over all devices.

        None where every sample of the batch is left out on all devices.
        """
        visual = self.vlm.vpg.tokens
        whole = {name: goal.weight(batch, visual) for name, goal in self.objectives.items()}
        # A device whose whole share is unreadable adds nothing; the others' shares are the batch.
        tokens, held = float(sum(len(text) for text in batch.encoded)), float(len(batch.inputs))
        samples, images, tokens, *weights = self.over_devices([float(len(batch)), held, tokens, *whole.values()])
        if not samples:
            return None
        whole = dict(zip(whole, weights, strict=True))
        terms = dict.fromkeys(whole, 0.0)
        passes = self.together.in_step(list(batch.parts(self.stage.micro_batch_size)), images=images > 0)
        with self.together.accumulating():
            for number, part in enumerate(passes, start=1):
                self.together.before_pass(last=number == len(passes))
                sums = self.losses(part)
                total = torch.zeros((), device=self.device)
                for name, (summed, _) in sums.items():
                    total = total + self.loss_weights[name] * summed / (whole[name] or 1.0)
                    terms[name] += summed.item() / (whole[name] or 1.0)
                if total.requires_grad:  # text alone teaches nothing to a projector
                    self.together.backward(total)
        terms = dict(zip(terms, self.over_devices(list(terms.values())), strict=True))
        loss = sum(self.loss_weights[name] * value for name, value in terms.items())
        return {
            "loss": loss,
            **{f"loss_{name}": value for name, value in terms.items()},
            "text_tokens": whole.get("caption", 0.0),
            "tokens": tokens,
        }

    @property
    def rank(self) -> int:
        """Which of the devices that train together this is."""
        return self.trainer.global_rank if self._trainer is not None else 0

    @property
    def world(self) -> int:
        """How many devices train together."""
        return self.trainer.world_size if self._trainer is not None else 1

    def configure_model(self) -> None:
        """Called by the trainer once the devices know each other."""
        self.together.split()
        self.fit_blocks(self.vlm)

    def on_fit_start(self) -> None:
        """Called by the trainer when all is set up."""
        self.together.begin()

    def over_devices(self, figures: Sequence[float], operation: Literal["sum", "max"] = "sum") -> list[float]:
        """The figures summed over devices, or the largest of each."""
        if self.world == 1:
            return list(figures)
        gathered = torch.tensor(figures, device=self.device, dtype=torch.float64)
        return self.trainer.strategy.reduce(gathered, reduce_op=operation).tolist()

    def from_all(self, value: Any) -> list[Any]:
        """What each device gives."""
        values = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def losses(self, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        """Each objective's summed loss on a batch, and the number of terms in it."""
        if len(batch.inputs):
            prompts = self.vlm.prompts_from(self.front.rest(batch.to(self.device).inputs))
        else:
            prompts = torch.empty(0, self.vlm.vpg.tokens, self.vlm.llm.width, device=self.device)
        return {name: goal(self.vlm, prompts, batch) for name, goal in self.objectives.items()}
