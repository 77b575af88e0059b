"""Vision encoders: pixels [B, 3, S, S] -> patch features [B, N, d_enc].

An encoder is frozen when it is built, and what is frozen stays in eval mode through `.train()`.
"""

from typing import Any

from torch import nn

from vpgtrans.blocks import find_blocks, linears_in
from vpgtrans.config import ConcatEncoderConfig, EncoderConfig, HuggingFaceEncoderConfig
from vpgtrans.vision.encoders.base import Encoder
from vpgtrans.vision.encoders.concat import ConcatEncoder
from vpgtrans.vision.encoders.efficientnet import EfficientNetLite0
from vpgtrans.vision.encoders.huggingface import HuggingFaceEncoder, open_config

__all__ = [
    "ConcatEncoder",
    "EfficientNetLite0",
    "Encoder",
    "HuggingFaceEncoder",
    "build",
    "encoder_blocks",
    "open_config",
    "transformer_linears",
]


def build(config: EncoderConfig, *, load_weights: bool = True) -> Encoder:
    """A frozen encoder in float32, with its reference's weights or (`load_weights=False`) random ones.

    Raises:
        RecipeError: the config doesn't fit the architecture, or there is no reference to load from.
        ReferenceError_: the reference doesn't resolve. CheckpointError, IntegrityError: its weights are not right.
    """
    encoder = _built(config)
    if load_weights:
        encoder.load_reference()
    return encoder


def _built(config: EncoderConfig) -> Encoder:
    """With random weights."""
    if isinstance(config, ConcatEncoderConfig):
        return ConcatEncoder([_built(each) for each in config.encoders])
    return HuggingFaceEncoder(config) if isinstance(config, HuggingFaceEncoderConfig) else EfficientNetLite0(config)


def transformer_linears(model: Any) -> list[str]:
    """Full names of the linear layers inside the blocks of a vision transformer; none where it has no blocks."""
    home = find_blocks(model, model.config.num_hidden_layers)
    return [] if home is None else linears_in(model, home)


def encoder_blocks(encoder: Encoder) -> list[nn.Module]:
    """The blocks of all vision transformers of an encoder; none where it holds no transformer."""
    found: list[nn.Module] = []
    models: list[Any] = encoder.transformers()
    for model in models:
        home = find_blocks(model, model.config.num_hidden_layers)
        found += [] if home is None else model.get_submodule(home)
    return found
