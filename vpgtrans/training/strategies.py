"""How several devices train together: what each of them holds, how gradients add up, how whole state is taken.

    one device, ddp          every device holds everything; gradients are summed once an update
    fsdp                     weights, gradients and optimizer state in shards, see `sharding`
    deepspeed-2, deepspeed-3 the same through DeepSpeed, see `zero`

`auto` is ddp: where everything fits, nothing moves between devices but the gradients of what trains, and these are few.
Losses are divided by what the whole batch holds, so gradients are *summed* over devices, never averaged.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vpgtrans.config import Mode, Part
from vpgtrans.training.parts import take_state, trained_parameters
from vpgtrans.training.samples import Batch

if TYPE_CHECKING:
    from vpgtrans.training.module import StageModule

BUCKET = 2**25
"""Numbers of gradients that are summed over devices at a time: 128 MB of float32."""


class Together:
    """Every device holds everything: one device, or several under DDP. What shards overrides what differs."""

    def __init__(self, module: "StageModule", *, several: bool = False):
        """several: whether there are several devices."""
        self.module = module
        self.several = several

    @property
    def world(self) -> int:
        """How many devices train together."""
        return self.module.world

    def plugin(self) -> Strategy | str:
        """What `L.Trainer` takes as its strategy."""
        return "ddp" if self.several else "auto"

    def split(self) -> None:
        """Give every device its share of the module. Called by the trainer before the optimizer is made."""

    def join(self) -> None:
        """Give every device the whole module again, as `split` found it but for what was trained."""

    # --- passes ---------------------------------------------------------------------------------

    def in_step(self, parts: Sequence[Batch], *, images: bool) -> list[Batch]:
        """The passes of an update on this device. images: whether any device's share of the update has one."""
        return list(parts)

    def paced(self, parts: Iterable[Batch]) -> Iterator[Batch]:
        """The passes of a validation on this device."""
        yield from parts

    def accumulating(self) -> AbstractContextManager[None]:
        """Around the passes of an update: within it every device keeps its gradients to itself.

        DDP would exchange them in every backward pass, and wait forever for a device that has a micro-batch less
        because an image of its share is unreadable.
        """
        trainer = self.module._trainer
        wrapped = trainer.strategy.model if trainer is not None else None
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def before_pass(self, *, last: bool) -> None:
        """Called before every forward pass of an update; last: its backward pass completes the gradient."""

    def backward(self, loss: Tensor) -> None:
        self.module.manual_backward(loss)

    # --- gradients ------------------------------------------------------------------------------

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over devices, many in one message; a parameter that no device used keeps none."""
        if self.world == 1:
            return
        counts = self.module.over_devices([float(parameter.grad is not None) for parameter in parameters])
        used = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(used):
            gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
            together = torch.cat([gradient.flatten() for gradient in gradients])
            together = self.module.trainer.strategy.reduce(together, reduce_op="sum")
            sums = together.split([gradient.numel() for gradient in gradients])
            for gradient, summed in zip(gradients, sums, strict=True):
                gradient.copy_(summed.view_as(gradient))

    def clip(self, parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
        """Scale the gradient down to a norm of at most `largest`; returns the norm it had."""
        return nn.utils.clip_grad_norm_(parameters, largest or math.inf)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step that the gradient asks for, after `clip`."""
        optimizer.step()

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradient."""
        optimizer.zero_grad(set_to_none=True)

    # --- state ----------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose groups' rates count."""
        optimizer = self.module.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Called when the optimizer is made: it goes on from where a resumed run stopped."""
        if self.module.resume_optimizer is not None:
            self.put_optimizer_state(optimizer, self.module.resume_optimizer)

    def begin(self) -> None:
        """Called before the first update, when everything is in its place."""

    def take(self, changed: dict[Part, Mode]) -> dict[str, Tensor]:
        """Whole copies of what changed, see `take_state`; all devices have to call it."""
        return take_state(self.module.vlm, changed)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state of the optimizer, by the parameters' names: any strategy and world size can go on from it.

        All devices have to call it.
        """
        names = self._names(optimizer)
        state = optimizer.state_dict()
        return {
            "state": {
                names[number]: {key: self._whole(value) for key, value in entry.items()}
                for number, entry in state["state"].items()
            },
            "param_groups": [
                {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
            ],
        }

    def put_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write back what `optimizer_state` took, wherever."""
        numbers: dict[Any, int] = {name: number for number, name in enumerate(self._names(optimizer))}
        numbers |= {number: number for number in range(len(numbers))}  # as it was kept before parameters had names
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = {
            numbers[name]: {
                key: self._share(value, parameters[numbers[name]]) if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }
            for name, entry in state["state"].items()
        }
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _names(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of the optimizer's parameters, in its order."""
        known = {
            id(parameter): f"{part}/{name}"
            for part, name, parameter in trained_parameters(self.module.vlm, self.module.stage)
        }
        return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

    def _whole(self, value: Any) -> Any:
        return value

    def _share(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """This device's share of whole state that belongs to a parameter."""
        return value


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype, as many as one message takes."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for alike in by_dtype.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in alike:
            if bucket and size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket


def make_together(name: str, module: "StageModule", world: int) -> Together:
    """What `trainer.strategy` names, for so many devices: a single one shares nothing."""
    if world == 1 or name in ("auto", "ddp"):
        return Together(module, several=world > 1)
    if name == "fsdp":
        from vpgtrans.training.sharding import Sharded

        return Sharded(module, world)
    from vpgtrans.training.zero import Zero

    return Zero(module, world, stage={"deepspeed-2": 2, "deepspeed-3": 3}[name])
