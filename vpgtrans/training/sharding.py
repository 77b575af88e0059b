"""`fsdp`: FSDP2 through Lightning's ModelParallelStrategy. Weights, gradients and optimizer state lie in shards.

    LLM blocks, encoder blocks    a unit each: gathered for its pass, let go after it
    the rest of LLM and encoder,
    connector                     one more unit: embeddings, norms and head are needed all through a pass
    projector, images in their    whole on every device, gradients summed as under ddp: small, or run a number of times
    native size, frozen fronts    that differs from device to device

Every pass of one device is a pass of all, or they wait for each other forever: a device with fewer micro-batches runs
blank ones, and a share without an image has a blank image beside it. Blank samples have no answer, so no loss.

The stage trains a second set of modules whose parameters are shards; the VLM's own modules are never hooked, their
tensors lie empty meanwhile, and `join` fills them again. So a stage needs no more memory than its shards, but before
and after it every device holds the whole VLM.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vpgtrans.prompts import VISUAL, Turn
from vpgtrans.training.parts import PARTS, part_module, whole_of
from vpgtrans.training.samples import Batch
from vpgtrans.training.strategies import Together
from vpgtrans.vlm import VLM

if TYPE_CHECKING:
    from vpgtrans.training.module import StageModule


class InStep(Together):
    """What needs every device to run as many passes, through the same parts; and trains a shadow of the VLM."""

    def __init__(self, module: "StageModule", devices: int):
        super().__init__(module)
        self.devices = devices
        self._own: VLM | None = None
        """The VLM whose tensors are in the shards."""
        self._blanks: tuple[Batch, Batch]

    def _step_behind(self, *, fresh: bool) -> None:
        """Put a shadow of the VLM into the module. fresh: with parameters of its own; the tensors are the same."""
        module = self.module
        if module.vlm.splice.both_ways and module.vlm.splice.isolation is None:
            module.vlm.splice.isolate()  # it runs the LLM, on whole weights
        self._blanks = _blanks(module)
        self._own = module.vlm
        module.vlm = _shadow(module.vlm, fresh=fresh)
        module.front = copy.copy(module.front)
        module.front.vpg = module.vlm.vpg

    def _step_forth(self) -> None:
        """Put the VLM itself into the module again."""
        module = self.module
        assert self._own is not None
        module.vlm, module.front = self._own, copy.copy(module.front)
        module.front.vpg = module.vlm.vpg
        self._own = None

    # --- passes ---------------------------------------------------------------------------------

    def in_step(self, parts: Sequence[Batch], *, images: bool) -> list[Batch]:
        missing = int(self.module.over_devices([float(len(parts))], "max")[0]) - len(parts)
        return [self._seeing(part) if images else part for part in parts] + [self._blanks[images]] * missing

    def paced(self, parts: Iterable[Batch]) -> Iterator[Batch]:
        own = iter(parts)
        while True:
            part = next(own, None)
            if not self.module.over_devices([float(part is not None)])[0]:
                return
            yield self._blanks[True] if part is None else self._seeing(part)

    def _seeing(self, part: Batch) -> Batch:
        """A part with a blank image, if it has none: its text goes nowhere near the vision parts otherwise."""
        return part if len(part.inputs) else part.beside(self._blanks[True])


class Sharded(InStep):
    """Shards of everything that is large."""

    def plugin(self) -> Strategy:
        return ModelParallelStrategy(data_parallel_size=self.devices, tensor_parallel_size=1)

    def split(self) -> None:
        if self._own is not None:
            return
        self._step_behind(fresh=False)
        module = self.module
        kept = self._kept_whole()
        mesh: Any = module.device_mesh
        assert mesh is not None
        units: list[nn.Module] = [*self._units(kept), module]
        for unit in units:
            before = dict(unit.named_parameters())
            fully_shard(unit, mesh=mesh["data_parallel"], ignored_params=kept)
            for name, now in unit.named_parameters():
                if isinstance(now, DTensor) and not isinstance(before[name], DTensor):
                    # the VLM's own parameter, which its modules still have
                    before[name].data = before[name].data.new_empty(0)
        for part in self._sharded():
            # Without the first gloo would be asked for a product that it doesn't know.
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
        register_fsdp_forward_method(module, "losses")

    @torch.no_grad()
    def join(self) -> None:
        if self._own is None:
            return
        module, own = self.module, self._own
        self._reshard()
        for (_, whole), (_, now) in zip(own.named_parameters(), module.vlm.named_parameters(), strict=True):
            if isinstance(now, DTensor):
                whole.data = whole_of(now)
        self._step_forth()

    def _kept_whole(self) -> set[nn.Parameter]:
        """Parameters that every device holds: of parts that no pass runs, or not as often everywhere."""
        module = self.module
        vpg, level = module.vlm.vpg, module.front.level
        whole: list[nn.Module] = [module.vlm.projector]
        if level != "pixels" or vpg.native:
            whole.append(vpg.encoder)
        if level == "tokens" or vpg.native:
            whole.append(vpg.connector)
        kept = {parameter for part in whole for parameter in part.parameters()}
        for name in PARTS:
            part = part_module(module.vlm, name)
            scalars = {parameter for parameter in part.parameters() if not parameter.ndim}
            # A number can't be cut; and an optimizer's group is in shards as a whole, or not at all.
            kept |= set(part.parameters()) if any(each.requires_grad for each in scalars) else scalars
        return kept

    def _units(self, kept: set[nn.Parameter]) -> Iterator[nn.Module]:
        """Blocks of the LLM and of the encoder."""
        for part in (self.module.vlm.language_model, self.module.vlm.vpg.encoder):
            for block in blocks(part):
                if any(parameter not in kept for parameter in block.parameters()):
                    yield block

    def _sharded(self) -> Iterator[FSDPModule]:
        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                yield unit

    def _reshard(self) -> None:
        """Between passes the last unit's parameters may still be whole."""
        for unit in self._sharded():
            unit.reshard()

    # --- passes ---------------------------------------------------------------------------------

    def before_pass(self, *, last: bool) -> None:
        # Kept back until the last pass, gradients travel once an update; but they are whole meanwhile, which only
        # what is small beside the weights may be.
        together = last or self.module.stage.trainable["llm"] == "full"
        for unit in self._sharded():
            unit.set_requires_gradient_sync(together, recurse=False)

    # --- gradients ------------------------------------------------------------------------------

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        super().add_up([parameter for parameter in parameters if not isinstance(parameter, DTensor)])

    @torch.no_grad()
    def clip(self, parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shards = [each.to_local() for each in gradients if isinstance(each, DTensor)]
        whole = [each for each in gradients if not isinstance(each, DTensor)]
        squares = nn.utils.get_total_norm(shards).to(self.module.device) ** 2
        squares = self.module.trainer.strategy.reduce(squares, reduce_op="sum")
        norm = (squares + nn.utils.get_total_norm(whole).to(squares) ** 2).sqrt()
        factor = torch.clamp((largest or math.inf) / (norm + 1e-6), max=1.0)
        for gradient in [*shards, *whole]:
            gradient.mul_(factor.to(gradient))
        return norm

    # --- state ----------------------------------------------------------------------------------

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        self._reshard()
        return super().optimizer_state(optimizer)

    def _whole(self, value: Any) -> Any:
        return whole_of(value).cpu() if isinstance(value, Tensor) else value

    def _share(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value  # a whole one's, or a count of steps
        return distribute_tensor(value.to(self.module.device), parameter.device_mesh, parameter.placements)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model is made of: the entries of its largest list of modules, none if it has no list."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # The outermost of equals comes first: a block may itself hold a list.
    return list(lists[max(range(len(lists)), key=[_size(each) for each in lists].__getitem__)]) if lists else []


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shadow(vlm: VLM, *, fresh: bool) -> VLM:
    """A VLM of other modules with the same tensors. fresh: in parameters of its own."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(vlm.parameters(), vlm.buffers())}
    if fresh:
        # A number as a vector of one: it goes everywhere that the number went, and can be cut and sent.
        memo |= {
            id(each): nn.Parameter(torch.atleast_1d(each.data), requires_grad=each.requires_grad)
            for each in vlm.parameters()
        }
    memo[id(vlm.llm.tokenizer)] = vlm.llm.tokenizer
    return copy.deepcopy(vlm, memo)


def _blanks(module: "StageModule") -> tuple[Batch, Batch]:
    """A sample without an image and one with a black image; neither has an answer, so the loss counts nothing."""
    vpg, prompter = module.vlm.vpg, module.vlm.splice.prompter
    side = vpg.encoder.config.image.size
    image = Image.new("RGB", (side, side))
    text = (Turn("user", "<image>"), Turn("assistant", "blank"))
    seeing = prompter.encode(text, [image.size])
    seeing = replace(seeing, answer=np.zeros_like(seeing.answer))
    inputs = module.front.of_levels(vpg.pieces([image], seeing.layouts))
    blind = replace(seeing, ids=seeing.ids[seeing.ids != VISUAL], images=0, layouts=())
    blind = replace(blind, answer=np.zeros(len(blind), dtype=bool))
    return Batch([], [text], [blind], torch.empty(0)), Batch([], [text], [seeing], inputs)
