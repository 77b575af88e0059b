"""LLaVA-1.5 (arXiv 2310.03744) in the Hugging Face layout: vision tower, two-layer projector, no connector."""

from pathlib import Path

import torch
from transformers import LlavaConfig, PreTrainedConfig

from vpgtrans.checkpoint_files import CheckpointFiles
from vpgtrans.config import HuggingFaceEncoderConfig, IdentityConnectorConfig, ImageConfig, ProjectorConfig
from vpgtrans.errors import TransferError
from vpgtrans.parts import load_strict
from vpgtrans.projector import Projector
from vpgtrans.vision.connectors import Identity
from vpgtrans.vision.encoders import HuggingFaceEncoder
from vpgtrans.vision.importers.source import ImportedSource, Outline, image_config, prompt_config
from vpgtrans.vision.vpg import VPG

DEFAULT_PROMPT = "USER: <image>\nASSISTANT:"
"""LLaVA-1.5's conversation, for checkpoints that carry no chat template."""

_LAYERS = {"linear_1": "layers.0", "linear_2": "layers.1"}


def outline(directory: Path, config: PreTrainedConfig, *, reference: str) -> Outline:
    """What `read` would give, from the configs alone."""
    with torch.device("meta"):
        vpg = _vpg(directory, config, reference=reference)
    return Outline(vpg, prompt_config(directory, default=DEFAULT_PROMPT))


def read(directory: Path, config: PreTrainedConfig, *, reference: str) -> ImportedSource:
    """Translate the checkpoint in `directory`."""
    vpg = _vpg(directory, config, reference=reference)
    assert isinstance(config, LlavaConfig)
    width = config.text_config.hidden_size
    assert isinstance(vpg.encoder, HuggingFaceEncoder)
    vpg.encoder.load_weights(directory)
    projector = Projector(
        ProjectorConfig(
            kind="mlp",
            hidden=width,
            activation=config.projector_hidden_act,
            bias=config.multimodal_projector_bias,
            norm=False,
        ),
        vpg.width,
        width,
    )

    tensors = CheckpointFiles(directory)
    projection = tensors.under(["multi_modal_projector.", "model.multi_modal_projector."])
    load_strict(projector, {_translated(name): t for name, t in projection.items()}, where=str(directory))
    return ImportedSource(
        vpg=vpg.eval(),
        projector=projector.eval(),
        prompt=prompt_config(directory, default=DEFAULT_PROMPT),
        source_llm=reference,
    )


def _vpg(directory: Path, config: PreTrainedConfig, *, reference: str) -> VPG:
    """The vision tower without its weights, its patches as they are."""
    assert isinstance(config, LlavaConfig)
    if not isinstance(config.vision_feature_layer, int):
        raise TransferError(
            f"{directory}: vision_feature_layer {config.vision_feature_layer} names several layers; one is supported"
        )
    vision = config.vision_config
    encoder = HuggingFaceEncoder(
        HuggingFaceEncoderConfig(
            reference=reference,
            architecture=vision.to_diff_dict(),
            layer=config.vision_feature_layer,
            final_norm=False,  # LLaVA takes hidden_states[layer], which no final norm has passed, also for layer -1
            select="patch" if config.vision_feature_select_strategy == "default" else "full",
            image=image_config(directory, vision, default=ImageConfig(fit="crop")),
        )
    )
    if encoder.config.select == "patch" and encoder.prefix != 1:
        raise TransferError(
            f"{directory}: vision_feature_select_strategy 'default' drops one token, but its vision tower "
            f"({vision.model_type}) has {encoder.prefix} tokens before the patches"
        )
    return VPG(encoder, Identity(IdentityConnectorConfig(), width_in=encoder.width, patches=encoder.patches))


def _translated(name: str) -> str:
    """`linear_1.weight` -> `layers.0.weight`; a name that is not of that form stays, and is refused on loading."""
    layer, _, rest = name.partition(".")
    return f"{_LAYERS.get(layer, layer)}.{rest}"
