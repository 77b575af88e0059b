"""Tiny random BLIP-2 and LLaVA-1.5 checkpoints, saved as a hub directory looks: weights, tokenizer, processor.

Not a test file. Weights are drawn anew, because transformers starts BLIP-2's queries at zero.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import SENTENCES, tiny_config, tiny_tokenizer

SIDE, PATCH = 28, 14
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_blip2(
    directory: str | Path,
    *,
    llm: str = "opt",
    queries: int = 4,
    seed: int = 0,
    max_shard_size: str = "1GB",
    sentences: tuple[str, ...] = SENTENCES,
) -> Path:
    """A BLIP-2 over the text model of family `llm` (see tiny.FAMILIES); returns the directory."""
    text = tiny_config(llm)
    config = transformers.Blip2Config(
        vision_config=transformers.Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=transformers.Blip2QFormerConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=40,
            encoder_hidden_size=VISION["hidden_size"],
            vocab_size=50,
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        image_token_index=text.vocab_size - 1,
    )
    model = _random(transformers.Blip2ForConditionalGeneration(config), seed)
    processor = {"do_resize": True, "size": {"height": SIDE, "width": SIDE}, "do_convert_rgb": True}
    return _save(
        model, directory, processor | {"image_processor_type": "BlipImageProcessor"}, max_shard_size, sentences
    )


def tiny_llava(
    directory: str | Path,
    *,
    llm: str = "llama-untied",
    seed: int = 0,
    layer: int = -2,
    strategy: str = "default",
    vision: transformers.PretrainedConfig | None = None,
    bias: bool = True,
    chat_template: str | None = LLAVA_CHAT,
    max_shard_size: str = "1GB",
    sentences: tuple[str, ...] = SENTENCES,
) -> Path:
    """A LLaVA-1.5 over the text model of family `llm` and a CLIP tower (or `vision`); returns the directory."""
    text = tiny_config(llm)
    config = transformers.LlavaConfig(
        vision_config=(vision or transformers.CLIPVisionConfig(**VISION)).to_dict(),
        text_config=text.to_dict(),
        image_token_index=text.vocab_size - 1,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        multimodal_projector_bias=bias,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    model = _random(transformers.LlavaForConditionalGeneration(config), seed)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
    }
    path = _save(model, directory, processor, max_shard_size, sentences)
    if chat_template is not None:
        (path / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))
    return path


def _random(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """Every tensor random, so that none that is left out or swapped goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _save(
    model: transformers.PreTrainedModel,
    directory: str | Path,
    processor: dict[str, Any],
    max_shard_size: str,
    sentences: tuple[str, ...],
) -> Path:
    directory = Path(directory)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    vocabulary = model.config.text_config.vocab_size - 12
    tiny_tokenizer("bytes", vocabulary=vocabulary, sentences=sentences).save_pretrained(directory)
    statistics = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3} | CLIP_STATISTICS
    (directory / "preprocessor_config.json").write_text(json.dumps(processor | statistics, indent=2))
    (directory / "processor_config.json").write_text(json.dumps({"image_token": "<image>"}))
    return directory
