"""`deepspeed-2` and `deepspeed-3`: ZeRO through Lightning's DeepSpeedStrategy.

    deepspeed-2   gradients and optimizer state in shards, weights whole
    deepspeed-3   weights in shards, too; gathered module by module

What trains is float32 and what is frozen keeps its dtype, as under every strategy, so no section of DeepSpeed's own
mixed precision is asked for, and nothing is offloaded. DeepSpeed averages gradients over devices, so losses are
multiplied by their number. It clips in its step, which is why a gradient that is not finite though the loss was is only
met after it; and it steps parameters that no device used with a gradient of zero, where other strategies leave them
as they are (of data with images in every batch there are none).

Whole optimizer state is gathered by name, so checkpoints are those of the other strategies.

Lightning's strategy runs on GPUs alone. This has run on two CPU processes by hand, with that check taken out: training
and its checkpoints, not their resumption. On GPUs it has not run. See docs/scaling.md.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from vpgtrans.config import Mode, Part
from vpgtrans.errors import RecipeError
from vpgtrans.training.parts import PARTS, part_module, trained_parameters
from vpgtrans.training.sharding import InStep

if TYPE_CHECKING:
    from vpgtrans.training.module import StageModule

_BUCKET = 2**27
"""Numbers that are exchanged at a time: half a gigabyte of float32."""
_STATE = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter."""


class _AsItIs(DeepSpeedPrecision):
    """Batches in the dtypes that they have: what takes them knows."""

    def convert_input(self, data: Any) -> Any:
        return data


class Zero(InStep):
    """ZeRO stage 2 or 3."""

    def __init__(self, module: "StageModule", devices: int, *, stage: int):
        super().__init__(module, devices)
        self.stage = stage
        self._finite = True
        self._names_of: list[tuple[str, nn.Parameter]] = []
        self._shapes: dict[nn.Parameter, torch.Size] = {}
        self._named_shapes: dict[str, torch.Size] = {}
        """As they are in the VLM, where there are numbers, too."""
        self._groups: list[list[str]] = []
        """Names of the optimizer's parameters, by its groups."""

    def plugin(self) -> DeepSpeedStrategy:
        return DeepSpeedStrategy(config=self.config(), precision_plugin=_AsItIs("32-true"))

    def config(self) -> dict[str, Any]:
        """DeepSpeed's."""
        return {
            "train_micro_batch_size_per_gpu": 1,  # it is said for its own log; how a batch is cut is decided here
            "gradient_clipping": self.module.stage.clip or 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self.stage,
                "contiguous_gradients": True,
                "overlap_comm": True,
                "allgather_bucket_size": _BUCKET,
                "reduce_bucket_size": _BUCKET,
            },
        }

    def split(self) -> None:
        if self._own is not None:
            return
        module = self.module
        if self.stage == 3 and module.vlm.vpg.native and module.front.level == "pixels":
            raise RecipeError(
                "trainer.strategy: deepspeed-3 can't take images in their native size, which go through the encoder as "
                "often as they have shapes; right would be fsdp or deepspeed-2"
            )
        self._step_behind(fresh=True)
        assert self._own is not None
        self._shapes = {parameter: parameter.shape for parameter in self._own.parameters()}
        self._named_shapes = {
            f"{part}/{name}": each.shape
            for part in PARTS
            for name, each in part_module(self._own, part).named_parameters()
        }
        self._names_of = [(f"{part}/{name}", each) for part, name, each in trained_parameters(module.vlm, module.stage)]
        front = {"pixels": [], "patches": [self._own.vpg.encoder], "tokens": [self._own.vpg]}[module.front.level]
        kept = {parameter for frozen in front for parameter in frozen.parameters()}  # what fills caches, and is small
        for parameter in self._own.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def join(self) -> None:
        if self._own is None:
            return
        for whole, now in zip(self._own.parameters(), self.module.vlm.parameters(), strict=True):
            with self._gathered([now]):
                whole.data = now.data.clone().view(self._shapes[whole])
        self._engine.destroy()
        self._step_forth()

    @property
    def _engine(self) -> Any:
        return self.module.trainer.strategy.model

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it the parameters are whole."""
        if self.stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))

    # --- passes and gradients -------------------------------------------------------------------

    def before_pass(self, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # The engine's own forward pass would say so; ours are several in one of those, and stage 3 would keep the last
        # gradient alone.
        self._engine.optimizer.clear_backward_seen_flag()

    def backward(self, loss: Tensor) -> None:
        self._finite &= bool(loss.isfinite())
        super().backward(loss * self.devices)

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """The engine has."""

    def clip(self, parameters: Sequence[nn.Parameter], largest: float | None) -> Tensor:
        """The whole step: the engine clips in it. It is not taken if a loss was not finite."""
        broken = self.module.over_devices([float(not self._finite)])[0]
        self._finite = True
        if broken:
            return torch.tensor(math.nan)
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """`clip` has."""

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        self._engine.optimizer.zero_grad()

    # --- state ----------------------------------------------------------------------------------

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Later, see `begin`: the engine is not there yet. But soon the groups' parameters are not there any more."""
        state = optimizer.state_dict()
        names = self._names(optimizer)
        self._groups = [[names[number] for number in group["params"]] for group in state["param_groups"]]

    def begin(self) -> None:
        """The optimizer gets its state, which it else had from its first step on: zeros, or a resumed run's."""
        from deepspeed.utils import safe_set_full_optimizer_state

        optimizer, saved = self.optimizer, self.module.resume_optimizer or {"state": {}}
        named = dict(self._names_of)
        entries = {
            (list(named)[name] if isinstance(name, int) else name): entry for name, entry in saved["state"].items()
        }
        steps = next((entry["step"] for entry in entries.values()), torch.tensor(0.0))
        engine = self._engine.optimizer
        for flat in engine.single_partition_of_fp32_groups if self.stage == 2 else engine.fp32_partitioned_groups_flat:
            optimizer.state[flat] = {"step": steps.clone(), **{key: torch.zeros_like(flat) for key in _STATE}}
        if self.stage == 2:
            # Its first step would do it after the first group's, when the others have no state yet.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, entry in entries.items():
            for key in _STATE:
                value = torch.atleast_1d(entry[key]).to(self.module.device)
                safe_set_full_optimizer_state(named[name], value, key)

    def take(self, changed: dict[Part, Mode]) -> dict[str, Tensor]:
        with self._gathered(list(self.module.vlm.parameters()) if "full" in changed.values() else self._trained):
            state = super().take(changed)
        return {name: tensor.view(self._named_shapes.get(name, tensor.shape)) for name, tensor in state.items()}

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self._names_of]

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, "params": names}
            for group, names in zip(optimizer.param_groups, self._groups, strict=True)
        ]
        steps = [entry["step"] for entry in optimizer.state.values()]
        if not steps:  # before the first update
            return {"state": {}, "param_groups": groups}
        entries = {
            name: {
                "step": torch.as_tensor(steps[0]).cpu().clone(),
                **{
                    key: safe_get_full_optimizer_state(each, key).cpu().clone().view(self._named_shapes[name])
                    for key in _STATE
                },
            }
            for name, each in self._names_of
        }
        return {"state": entries, "param_groups": groups}
