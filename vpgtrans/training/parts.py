"""Which parts of a VLM train in a stage, and how: applied to the modules, shown as a table, taken out as a state."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vpgtrans.adapters import adapter_state, inject, is_adapted, lora_config, of_adapter, put_adapter
from vpgtrans.config import LoRAConfig, Mode, Part
from vpgtrans.errors import RecipeError
from vpgtrans.lean_lora import lean
from vpgtrans.llm import block_linears
from vpgtrans.parts import load_strict
from vpgtrans.quantise import weights_in
from vpgtrans.training.config import Stage
from vpgtrans.vision.encoders import transformer_linears
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM

PARTS: tuple[Part, ...] = ("encoder", "connector", "projector", "llm")


def part_module(vlm: VLM, part: Part) -> nn.Module:
    """The module of a part."""
    modules = {
        "encoder": vlm.vpg.encoder,
        "connector": vlm.vpg.connector,
        "projector": vlm.projector,
        "llm": vlm.language_model,
    }
    return modules[part]


def check_stages(stages: Sequence[Stage], vpg: VPG, model: nn.Module) -> None:
    """Refuse stages that would train nothing on these parts; before anything is written.

    Raises:
        RecipeError: an adapter's targets name what the part doesn't have, the encoder has no layers that could be
            adapted, or the parts that train have no parameters.
    """
    for stage in stages:
        trains = {part for part, mode in stage.trainable.items() if mode != "frozen"}
        if stage.trainable["llm"] == "lora":
            _check_targets(f"stage {stage.name}: lora", stage.lora, block_linears(model), "LLM")
        if stage.trainable["encoder"] == "lora":
            names = [name for model in vpg.encoder.transformers() for name in transformer_linears(model)]
            if not names:
                raise RecipeError(
                    f"stage {stage.name}: trainable.encoder: lora goes on the linear layers of a vision transformer's "
                    f"blocks, and {vpg.encoder.config.kind} has none; right would be encoder: full or frozen"
                )
            _check_targets(f"stage {stage.name}: encoder_lora", stage.encoder_lora, names, "encoder")
        if trains == {"connector"} and not any(True for _ in vpg.connector.parameters()):
            raise RecipeError(
                f"stage {stage.name}: trains nothing: the connector ({vpg.config.connector.kind}) has no parameters; "
                "train the projector too"
            )


def _check_targets(key: str, config: LoRAConfig, names: Sequence[str], owner: str) -> None:
    there = sorted({name.rsplit(".", 1)[-1] for name in names})
    if wrong := [target for target in config.targets or () if target not in there]:
        raise RecipeError(
            f"{key}.targets: {', '.join(wrong)}: the {owner}'s blocks have no such linear layer; they have "
            f"{', '.join(there)}"
        )


def add_adapter(vlm: VLM, config: LoRAConfig) -> None:
    """Put LoRA on the LLM's block linears, named exactly; its weights are float32, its output zero at first."""
    adapted = get_peft_model(vlm.language_model, lora_config(config, block_linears(vlm.language_model)))
    adapted.peft_config["default"].base_model_name_or_path = vlm.llm.reference
    lean(adapted)
    vlm.language_model = adapted
    vlm.llm.model = adapted


def _add_encoder_adapter(vlm: VLM, config: LoRAConfig) -> None:
    """The same on the blocks of an encoder's vision transformers."""
    for model in vlm.vpg.encoder.transformers():
        inject(model, config, transformer_linears(model))


def set_trainable(vlm: VLM, stage: Stage) -> None:
    """Set `requires_grad` of every parameter as the stage says, and every module's train or eval mode."""
    for part in PARTS:
        module, mode = part_module(vlm, part), stage.trainable[part]
        if mode == "lora" and not is_adapted(module):
            if part == "encoder":
                _add_encoder_adapter(vlm, stage.encoder_lora)
            else:
                add_adapter(vlm, stage.lora)
            module = part_module(vlm, part)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(mode == ("lora" if of_adapter(name) else "full"))
        if mode == "full":
            module.float()  # updates of a large-rate optimizer vanish in half precision
    set_modes(vlm, stage)


def set_modes(vlm: VLM, stage: Stage) -> None:
    """Parts that train in train mode, frozen parts in eval mode (also the modules inside)."""
    for part in PARTS:
        part_module(vlm, part).train(stage.trainable[part] != "frozen")


def trained_parameters(vlm: VLM, stage: Stage) -> Iterator[tuple[Part, str, nn.Parameter]]:
    """(part, name, parameter) of all that trains in a stage."""
    for part in PARTS:
        for name, parameter in part_module(vlm, part).named_parameters():
            if parameter.requires_grad:
                yield part, name, parameter


def table(vlm: VLM, stage: Stage) -> list[dict[str, Any]]:
    """A row a part: stage, part, mode, parameters (all of the part's), trained (those that train), lr."""
    rows = []
    for part in PARTS:
        parameters = list(part_module(vlm, part).parameters())
        rows.append(
            {
                "stage": stage.name,
                "part": part,
                "mode": stage.trainable[part],
                "parameters": sum(map(weights_in, parameters)),
                "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
                "lr": stage.rates.get(part),
            }
        )
    return rows


def changed_parts(stages: list[Stage]) -> dict[Part, Mode]:
    """Which parts differ from where a run began after the given stages, and by what."""
    changed: dict[Part, Mode] = {}
    for stage in stages:
        for part, mode in stage.trainable.items():
            if mode != "frozen":
                changed[part] = "full" if "full" in (mode, changed.get(part)) else mode
    return changed


def take_state(vlm: VLM, changed: dict[Part, Mode]) -> dict[str, Tensor]:
    """Copies of the tensors of the changed parts, named `part/tensor`; a LoRA part gives its adapter only.

    Of a VLM in shards they are whole, on every device; all devices have to call it.
    """
    state: dict[str, Tensor] = {}
    for part, mode in changed.items():
        module = part_module(vlm, part)
        tensors = adapter_state(module) if mode == "lora" else module.state_dict()
        state |= {f"{part}/{name}": whole_of(tensor).cpu().clone() for name, tensor in tensors.items()}
    return state


def whole_of(tensor: Tensor) -> Tensor:
    """A tensor without its gradient; of one in shards all of it, for which all devices have to call this."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


@torch.no_grad()
def put_state(vlm: VLM, state: dict[str, Tensor], changed: dict[Part, Mode], *, where: str) -> None:
    """Write back what `take_state` took.

    Raises:
        CheckpointError: a tensor is missing, extra or mis-shaped.
    """
    for part, mode in changed.items():
        prefix = f"{part}/"
        tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        put = put_adapter if mode == "lora" else load_strict
        put(part_module(vlm, part), tensors, where=f"{where}, {part}")
