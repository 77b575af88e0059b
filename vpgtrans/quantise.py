"""The weights of an LLM's blocks in 4 or 8 bits, while adapters train beside them: QLoRA (arXiv 2305.14314).

bitsandbytes does it, on a CPU and on a GPU. Embeddings and head stay as they are: prompts live in their space, and a
fingerprint of the LLM knows them.
"""

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
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
    """Have 4-bit layers pass gradients on whatever happened to them before, and 8-bit ones say nothing.

    On a CPU with bf16, bitsandbytes repacks a layer's weights the first time it runs without gradients, for a product
    that has no backward: the next update would train nothing below it. Of every product in 8 bits it warns that
    activations become float16 on the way to int8.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)


def weights_in(parameter: nn.Parameter) -> int:
    """How many weights a parameter holds: in 4 bits two of them share an entry."""
    state: Any = getattr(parameter, "quant_state", None)  # bitsandbytes' own parameters have one
    return parameter.numel() if state is None else state.shape.numel()
