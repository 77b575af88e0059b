"""The optimizer of a stage: AdamW, its moments in 32 bits or 8, in the GPU's memory or moving out of it."""

from typing import Any, Literal

import torch
from torch import nn

from vpgtrans.config import Part
from vpgtrans.training.config import Stage
from vpgtrans.training.parts import trained_parameters
from vpgtrans.vlm import VLM

Kind = Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"]

BETAS = (0.9, 0.98)


def build_optimizer(vlm: VLM, stage: Stage, kind: Kind = "adamw") -> torch.optim.Optimizer:
    """AdamW over all that trains, each part at its rate; biases and norm weights (tensors of fewer than two dimensions)
    without weight decay."""
    sorted_out: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for part, _, parameter in trained_parameters(vlm, stage):
        sorted_out.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": stage.rates[part],
            "peak_lr": stage.rates[part],
            "weight_decay": stage.weight_decay if decays else 0.0,
        }
        for (part, decays), parameters in sorted_out.items()
    ]
    return _class(kind)(groups, betas=BETAS)


def _class(kind: Kind) -> Any:
    if kind == "adamw":
        return torch.optim.AdamW
    from bitsandbytes import optim

    return {
        "adamw-8bit": optim.AdamW8bit,
        "paged-adamw": optim.PagedAdamW,
        "paged-adamw-8bit": optim.PagedAdamW8bit,
    }[kind]
