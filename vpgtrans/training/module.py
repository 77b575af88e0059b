"""The one LightningModule: it runs any stage, because stages are data.

One batch is one optimizer update. It is split into micro-batches here, and every loss is divided by what the *whole*
batch (over all devices) holds, so that neither accumulation nor the number of devices changes an update.
"""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vpgtrans.errors import TrainingError
from vpgtrans.recipe import Stage
from vpgtrans.training.features import FrozenFront
from vpgtrans.training.parts import set_modes, trained_parameters
from vpgtrans.training.samples import Batch
from vpgtrans.vlm import VLM


class StageModule(L.LightningModule):
    """A VLM in one stage of its training.

    Args:
        objectives: name -> module, the names are those of `stage.losses`.
        updates: length of the stage. done: updates that a resumed run has behind it. stream: seeds of the updates are
            drawn from (seed, stream), so that every stage has its own.
    """

    def __init__(
        self,
        vlm: VLM,
        stage: Stage,
        *,
        front: FrozenFront,
        objectives: nn.ModuleDict,
        updates: int,
        done: int = 0,
        seed: int = 0,
        stream: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.vlm = vlm
        self.stage = stage
        self.front = front
        self.objectives = objectives
        self.updates = updates
        self.done = done
        self.seed = seed
        self.stream = stream
        self.resume_optimizer: dict[str, Any] | None = None
        self.last: dict[str, float] = {}
        """Figures of the last update: loss, lr, grad_norm, text_tokens."""

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
        """AdamW; biases and norm weights (tensors of fewer than two dimensions) without weight decay."""
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for part, _, parameter in trained_parameters(self.vlm, self.stage):
            groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.stage.rates[part],  # type: ignore[index]
                    "peak_lr": self.stage.rates[part],  # type: ignore[index]
                    "weight_decay": self.stage.weight_decay if decays else 0.0,
                }
                for (part, decays), parameters in groups.items()
            ],
            betas=(0.9, 0.98),
        )
        if self.resume_optimizer is not None:
            optimizer.load_state_dict(self.resume_optimizer)
        return optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update.

        Raises:
            TrainingError: the loss is not finite; nothing was changed by this batch.
        """
        # Dropout of an update depends on (seed, stage, update) alone: a resumed run needs no generator state.
        torch.manual_seed((self.seed * 1_000_003 + self.stream * 10_007 + self.done) % 2**63)
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        factor = self.rate_factor(self.done)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        losses = self._backward(batch)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.stage.clip or math.inf)
        if not math.isfinite(losses["loss"]) or not torch.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"stage {self.stage.name}, update {self.done + 1}: the loss is {losses['loss']}, the gradient's norm "
                f"{norm.item()}; the batch held {', '.join(batch.ids)}. Lower the learning rate, or look at these "
                "samples; the last good checkpoint is kept"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.done += 1
        # The trainer counts steps of its own wrapper, which manual steps of the plain optimizer do not reach.
        self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.increment_completed()
        self.last = {
            **losses,
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "grad_norm": norm.item(),
        }

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Accumulate the batch's gradient; returns the loss, its terms and the text tokens, over all devices."""
        visual = self.vlm.vpg.tokens
        whole = {name: goal.weight(self.vlm, batch.captions, visual) for name, goal in self.objectives.items()}
        world = self.trainer.world_size if self._trainer is not None else 1
        if world > 1:
            gathered = torch.tensor(list(whole.values()), device=self.device, dtype=torch.float64)
            whole = dict(zip(whole, self.trainer.strategy.reduce(gathered, reduce_op="sum").tolist(), strict=True))
        size = self.stage.micro_batch_size or len(batch)
        terms = dict.fromkeys(whole, 0.0)
        for start in range(0, len(batch), size):
            micro = batch.part(start, start + size)
            sums = self.losses(micro)
            total = torch.zeros((), device=self.device)
            for name, (summed, _) in sums.items():
                # Gradients are averaged over devices: hence the factor.
                total = total + self.stage.losses[name] * summed * (world / whole[name])
                terms[name] += summed.item() / whole[name]
            self.manual_backward(total)
        if world > 1:
            gathered = torch.tensor(list(terms.values()), device=self.device, dtype=torch.float64)
            terms = dict(zip(terms, self.trainer.strategy.reduce(gathered, reduce_op="sum").tolist(), strict=True))
        loss = sum(self.stage.losses[name] * value for name, value in terms.items())
        return {
            "loss": loss,
            **{f"loss_{name}": value for name, value in terms.items()},
            "text_tokens": whole.get("caption", 0.0),
        }

    def losses(self, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        """Each objective's summed loss on a batch, and the number of terms in it."""
        prompts = self.vlm.prompts_from(self.front.rest(batch.inputs.to(self.device)))
        return {name: goal(self.vlm, prompts, batch.captions) for name, goal in self.objectives.items()}
