"""What an importer hands over, and what importers share: reading config, preprocessing and prompt."""

import logging
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedConfig
from transformers.utils.chat_template_utils import render_jinja_template

from vpgtrans.config import ImageConfig, PromptConfig
from vpgtrans.errors import ReferenceError_
from vpgtrans.parts import read_object
from vpgtrans.projector import Projector
from vpgtrans.vision.preprocess import image_config_from
from vpgtrans.vision.vpg import VPG

logger = logging.getLogger(__name__)

IMAGE = "<image>"


@dataclass
class ImportedSource:
    """Another project's VLM in our parts, all in eval mode.

    Attributes:
        vpg: encoder and connector with their weights. projector: into the source LLM's embedding space.
        prompt: the text around the image that the checkpoint states. source_llm: reference of the checkpoint, whose
            language model is the source LLM.
    """

    vpg: VPG
    projector: Projector
    prompt: PromptConfig
    source_llm: str


@dataclass(frozen=True)
class Outline:
    """What of a source is known without its weights: a VPG of its shapes, and its prompt if it has one."""

    vpg: VPG
    prompt: PromptConfig | None

    @property
    def visual_tokens(self) -> int:
        """Of an image."""
        return self.vpg.tokens


def image_config(directory: Path, vision: PreTrainedConfig, *, default: ImageConfig) -> ImageConfig:
    """The preprocessing that the checkpoint states; `default` at the vision model's own size where it states none."""
    stated = image_config_from(directory)
    if stated is not None:
        return stated
    logger.warning("%s has no preprocessor_config.json: taking the usual preprocessing of its family", directory)
    return default.model_copy(update={"size": vision.image_size})


def prompt_config(directory: Path, *, default: str) -> PromptConfig:
    """The checkpoint's chat template around one image and nothing else; `default` where it has no such template."""
    template = _chat_template(directory)
    if template is None:
        return PromptConfig(template=default)
    token = _image_token(directory)
    message = {"role": "user", "content": [{"type": "image"}]}
    try:
        rendered = render_jinja_template(
            conversations=[[message]], chat_template=template, add_generation_prompt=True, bos_token="", eos_token=""
        )[0][0]
    except (TemplateError, TypeError, ValueError) as error:
        logger.warning("%s: its chat template takes no image alone (%s); using %r", directory, error, default)
        return PromptConfig(template=default)
    rendered = rendered.replace(token, IMAGE)
    if rendered.count(IMAGE) != 1:
        logger.warning("%s: its chat template places %d images; using %r", directory, rendered.count(IMAGE), default)
        return PromptConfig(template=default)
    return PromptConfig(template=rendered)


def _chat_template(directory: Path) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            template = read_object(directory / name, otherwise=ReferenceError_).get("chat_template")
            if isinstance(template, str):
                return template
    return None


def _image_token(directory: Path) -> str:
    """The text of the image token, which the processor's config may rename."""
    path = directory / "processor_config.json"
    token = read_object(path, otherwise=ReferenceError_).get("image_token") if path.is_file() else None
    return token["content"] if isinstance(token, dict) else token or IMAGE
