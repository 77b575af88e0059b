"""LoRA adapters: their tensors taken out, put back strictly, read from a directory that peft alone can read too."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vpgtrans.errors import CheckpointError
from vpgtrans.parts import check_fit

ADAPTER_MODULES = frozenset({"lora_A", "lora_B"})
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


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The tensors of a PeftModel's adapter, named as in its file."""
    # Not "auto": peft would look the base up on the hub, to see if its vocabulary has grown.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@torch.no_grad()
def put_adapter(model: Any, state: Mapping[str, Tensor], *, where: str) -> None:
    """Write `state` into a PeftModel's adapter.

    Raises:
        CheckpointError: naming every tensor that is missing, extra or mis-shaped.
    """
    check_fit(adapter_state(model), state, what="adapter", where=where)
    set_peft_model_state_dict(model, dict(state))


def open_adapter(model: Any, directory: Path) -> Any:
    """The PeftModel of a base model and an adapter's directory, for inference.

    Raises:
        CheckpointError: the directory can't be read, or its tensors are not those that its config asks for.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
        state = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a readable adapter ({error})") from error
    config.inference_mode = True
    # What it names is where the base lay when it was trained; whether this is the same base is checked before.
    config.base_model_name_or_path = model.name_or_path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, config)
    except ValueError as error:  # its target modules are not in this model
        raise CheckpointError(f"{directory}: the adapter does not fit {type(model).__name__}: {error}") from error
    put_adapter(adapted, state, where=str(directory))
    return adapted
