"""The weights of an LLM's blocks in 4 or 8 bits, while adapters train beside them: QLoRA (arXiv 2305.14314).

bitsandbytes does it, on a CPU and on a GPU. Embeddings and head stay as they are: prompts live in their space, and a
fingerprint of the LLM knows them.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import BitsAndBytesConfig

from vpgtrans.config import Quantisation
from vpgtrans.errors import RecipeError

BLOCK = 64
"""Weights that share a scale in NF4."""
SUPPORTED = ("cpu", "cuda")

_REPACKS = "support_avx512bf16_for_cpu"
"""What bitsandbytes calls it that a 4-bit layer may repack its weights."""


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def check_bitsandbytes(key: str) -> None:
    """Raises RecipeError, for the recipe's `key`, where bitsandbytes is not installed."""
    if not has_bitsandbytes():
        raise RecipeError(f"{key}: bitsandbytes is not installed; right would be pip install 'vpgtrans[quantised]'")


def check_quantisation(kind: Quantisation, layers: Sequence[tuple[str, int]]) -> None:
    """Whether an LLM's layers can be quantised; before its weights are read.

    Args:
        layers: name and width of the input of each linear layer of its blocks.

    Raises:
        RecipeError: bitsandbytes has no blocks for such widths.
    """
    odd = {name: width for name, width in layers if width % BLOCK}
    if kind == "nf4" and odd:
        name, width = next(iter(odd.items()))
        raise RecipeError(
            f"target.quantise: nf4 takes weights in blocks of {BLOCK}, and {name} of this LLM has {width} columns; "
            "right would be int8, or an LLM whose widths are multiples"
        )


def quantisation_config(kind: Quantisation, *, dtype: torch.dtype, leave: Sequence[str]) -> BitsAndBytesConfig:
    """What `from_pretrained` takes. leave: names of the linear layers that are none of the blocks'."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(leave))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=list(leave),
    )


def keep_trainable(model: nn.Module) -> None:
    """Have quantised layers compute the same whatever else is in a batch, and pass gradients on.

    bitsandbytes' own products don't: in 8 bits, activations are quantised too, but for columns that are
    large in *any* row, so that a sample's neighbours change what it gives; in 4 bits, on a CPU with bf16, weights are
    repacked the first time that a layer runs without gradients, for a product that has no backward.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)
        elif type(module).__name__ == "Linear8bitLt":
            module.forward = partial(_weights_alone, module)


def _weights_alone(layer: Any, inputs: Tensor) -> Tensor:
    if layer.weight.CB is not None:
        layer.init_8bit_state()  # from where it is loaded to where it is used
    return _Int8Linear.apply(inputs, layer.state.CB, layer.state.SCB, layer.bias)


class _Int8Linear(torch.autograd.Function):
    """Inputs [..., d_in] through weights int8 [d_out, d_in] that have a scale a row; the weights get no gradient.

    Nothing is kept for the way back but what is there anyway: the weights are brought to the inputs' dtype twice.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, inputs.dtype
        return F.linear(inputs, _dequantised(weight, scale, inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight = _dequantised(ctx.weight, ctx.scale, gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None, None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale[:, None] / 127)


def weights_in(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds: in 4 bits two of them share an entry."""
    state: Any = getattr(parameter, "quant_state", None)  # bitsandbytes' own parameters have one
    return parameter.numel() if state is None else state.shape.numel()
