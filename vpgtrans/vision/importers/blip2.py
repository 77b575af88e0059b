"""BLIP-2 (arXiv 2301.12597) in the Hugging Face layout: vision model, Q-Former, linear language projection."""

from pathlib import Path

import torch
from transformers import Blip2Config, PreTrainedConfig

from vpgtrans.checkpoint_files import CheckpointFiles
from vpgtrans.config import HuggingFaceEncoderConfig, ImageConfig, ProjectorConfig, QFormerConnectorConfig
from vpgtrans.errors import TransferError
from vpgtrans.parts import load_strict
from vpgtrans.projector import Projector
from vpgtrans.vision.connectors import QFormer
from vpgtrans.vision.encoders import HuggingFaceEncoder
from vpgtrans.vision.importers.source import ImportedSource, Outline, image_config, prompt_config
from vpgtrans.vision.tensors import drop_obsolete
from vpgtrans.vision.vpg import VPG

DEFAULT_PROMPT = "<image>"
"""BLIP-2 was trained to continue from the image alone."""


def outline(directory: Path, config: PreTrainedConfig, *, reference: str) -> Outline:
    """What `read` would give, from the configs alone."""
    with torch.device("meta"):
        vpg = _vpg(directory, config, reference=reference)
    return Outline(vpg, prompt_config(directory, default=DEFAULT_PROMPT))


def read(directory: Path, config: PreTrainedConfig, *, reference: str) -> ImportedSource:
    """Translate the checkpoint in `directory`."""
    assert isinstance(config, Blip2Config)
    vpg = _vpg(directory, config, reference=reference)
    assert isinstance(vpg.encoder, HuggingFaceEncoder)
    vpg.encoder.load_weights(directory)
    connector = vpg.connector
    projector = Projector(ProjectorConfig(norm=False), vpg.width, config.text_config.hidden_size)

    tensors = CheckpointFiles(directory)
    where = str(directory)
    state = {f"qformer.{name}": t for name, t in tensors.under(["qformer.", "model.qformer."]).items()}
    drop_obsolete(state, connector.state_dict())
    [state["queries"]] = tensors.under(["query_tokens", "model.query_tokens"]).values()
    load_strict(connector, state, where=where)
    projection = tensors.under(["language_projection.", "model.language_projection."])
    load_strict(projector, {f"layers.0.{name}": t for name, t in projection.items()}, where=where)
    return ImportedSource(
        vpg=vpg.eval(),
        projector=projector.eval(),
        prompt=prompt_config(directory, default=DEFAULT_PROMPT),
        source_llm=reference,
    )


def _vpg(directory: Path, config: PreTrainedConfig, *, reference: str) -> VPG:
    """Encoder and Q-Former without their weights."""
    assert isinstance(config, Blip2Config)
    vision, qformer = config.vision_config, config.qformer_config
    if qformer.use_qformer_text_input:
        raise TransferError(f"{directory}: its Q-Former reads text too (an image-text matching model), unsupported")
    if qformer.hidden_dropout_prob != qformer.attention_probs_dropout_prob:
        raise TransferError(
            f"{directory}: the Q-Former's two dropouts differ ({qformer.hidden_dropout_prob} and "
            f"{qformer.attention_probs_dropout_prob}); set both to one value in config.json"
        )
    encoder = HuggingFaceEncoder(
        HuggingFaceEncoderConfig(
            reference=reference,
            architecture=vision.to_diff_dict(),
            image=image_config(directory, vision, default=ImageConfig()),
        )
    )
    connector = QFormer(
        QFormerConnectorConfig(
            queries=config.num_query_tokens,
            width=qformer.hidden_size,
            layers=qformer.num_hidden_layers,
            heads=qformer.num_attention_heads,
            hidden=qformer.intermediate_size,
            cross_attention_frequency=qformer.cross_attention_frequency,
            dropout=qformer.hidden_dropout_prob,
            activation=qformer.hidden_act,
            layer_norm_eps=qformer.layer_norm_eps,
        ),
        width_in=encoder.width,
        patches=encoder.patches,
    )
    return VPG(encoder, connector)
