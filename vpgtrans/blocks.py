"""The blocks of a transformer, found by their number: where adapters go, what is checkpointed and compiled."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def find_blocks(model: nn.Module, count: int) -> str | None:
    """The name of a model's list of `count` blocks, None where it has none."""
    stacks = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # the outermost list: a block may itself hold as many experts as the model has blocks
    return min(stacks, key=lambda name: name.count(".")) if stacks else None


def linears_in(model: nn.Module, home: str) -> list[str]:
    """Full names of the linear layers in what is called `home`: `Linear` and GPT-2's `Conv1D`."""
    inside = model.get_submodule(home).named_modules()
    return [f"{home}.{name}" for name, module in inside if isinstance(module, nn.Linear | Conv1D)]
