"""LoRA adapters: put on exactly named layers, their tensors taken out, put back strictly, read from a directory.

An LLM becomes a `PeftModel`, and its adapter's directory is one that peft alone can read. An encoder keeps its class
and its interface: the adapter goes into its layers, and is merged into their weights when it is saved.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vpgtrans.config import LoRAConfig
from vpgtrans.errors import CheckpointError
from vpgtrans.parts import check_fit

ADAPTER_MODULES = frozenset({"lora_A", "lora_B", "lora_magnitude_vector"})
ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""peft's name for the tensors beside `adapter_config.json`."""
_WRAPPED = "base_layer"
"""What peft calls a layer inside the one that adapts it."""


def base_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a base model under its own names, also where peft has put an adapter into its layers."""
    named = ((name.split("."), tensor) for name, tensor in model.state_dict().items())
    return {
        ".".join(part for part in parts if part != _WRAPPED): tensor
        for parts, tensor in named
        if ADAPTER_MODULES.isdisjoint(parts)
    }


def of_adapter(name: str) -> bool:
    """Whether a tensor of this name is an adapter's."""
    return not ADAPTER_MODULES.isdisjoint(name.split("."))


def is_adapted(module: nn.Module) -> bool:
    """Whether there is an adapter in a part."""
    return any(isinstance(inner, LoraLayer) for inner in module.modules())


def lora_config(config: LoRAConfig, names: Sequence[str]) -> LoraConfig:
    """What peft takes, for these layers by their full names; those that `config.targets` leaves out are."""
    if config.targets is not None:
        names = [name for name in names if name.rsplit(".", 1)[-1] in config.targets]
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(names),
        bias="none",
        use_rslora=config.rslora,
        use_dora=config.dora,
    )


def inject(module: nn.Module, config: LoRAConfig, names: Sequence[str]) -> None:
    """Put an adapter into named layers of a module, which stays what it is."""
    inject_adapter_in_model(lora_config(config, names), module)


@torch.no_grad()
def merge(module: nn.Module) -> None:
    """Make an injected adapter part of the weights; the layers are then what they were before it."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            module.set_submodule(name, layer.get_base_layer())


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a part's adapter: of a PeftModel named as in its file, else as in the module."""
    if not isinstance(model, PeftModel):
        return {name: tensor for name, tensor in model.state_dict().items() if of_adapter(name)}
    # Not "auto": peft would look the base up on the hub, to see if its vocabulary has grown.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@torch.no_grad()
def put_adapter(model: Any, state: Mapping[str, Tensor], *, where: str) -> None:
    """Write `state` into a part's adapter.

    Raises:
        CheckpointError: naming every tensor that is missing, extra or mis-shaped.
    """
    check_fit(adapter_state(model), state, what="adapter", where=where)
    if not isinstance(model, PeftModel):
        model.load_state_dict(dict(state), strict=False)  # what is missing is not the adapter's
        return
    set_peft_model_state_dict(model, dict(state))


def open_adapter(model: Any, directory: Path) -> Any:
    """The PeftModel of a base model and an adapter's directory, for inference.

    Raises:
        CheckpointError: the directory can't be read, or its tensors are not those that its config asks for.
    """
    adapted = fresh_adapter(model, directory)
    try:
        state = load_file(directory / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a readable adapter ({error})") from error
    put_adapter(adapted, state, where=str(directory))
    return adapted


def fresh_adapter(model: Any, directory: Path) -> Any:
    """The PeftModel of a base model with an untrained adapter, as the config in an adapter's directory says.

    Raises:
        CheckpointError: the config can't be read, or names layers that the model hasn't.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: not a readable adapter ({error})") from error
    config.inference_mode = True
    # What it names is where the base lay when it was trained; whether this is the same base is checked before.
    config.base_model_name_or_path = model.name_or_path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(model, config)
    except ValueError as error:  # its target modules are not in this model
        raise CheckpointError(f"{directory}: the adapter does not fit {type(model).__name__}: {error}") from error
