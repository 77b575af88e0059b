"""Vision transformers of `transformers`, alone or out of a composite checkpoint."""

import inspect
import logging
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from vpgtrans.checkpoint_files import CheckpointFiles
from vpgtrans.config import HuggingFaceEncoderConfig, ImageConfig
from vpgtrans.errors import CheckpointError, RecipeError, ReferenceError_
from vpgtrans.references import portable, resolve
from vpgtrans.vision.encoders.base import Encoder
from vpgtrans.vision.preprocess import image_config_from
from vpgtrans.vision.tensors import load_vision_model

_LOGGER = logging.getLogger(__name__)

COMPOSITE = {
    "blip-2": ("vision_model.", "model.vision_model."),
    "llava": ("vision_tower.", "model.vision_tower."),
}
"""Where composite checkpoints keep the vision model, by model_type, where its own class would not find it."""

SIGLIP_POOLER = "head"
"""SigLIP's module that pools the patches into one vector, which nothing here takes: it is never built."""

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""Fields of a transformers config that say nothing about the architecture."""


class HuggingFaceEncoder(Encoder):
    """A vision transformer of `transformers`.

    Features are `hidden_states[layer]`. With layer -1 and `final_norm` they are the model's own `last_hidden_state`,
    which its final layer norm has passed where the family norms patches at all (CLIP norms its class token only).
    """

    config: HuggingFaceEncoderConfig

    def __init__(self, config: HuggingFaceEncoderConfig):
        super().__init__()
        vision = _vision_config(config)
        side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if not isinstance(side, int) or not isinstance(patch, int):
            named = f" ({config.reference})" if config.reference else ""
            raise RecipeError(
                f"encoder: {vision.model_type}{named} has no square images and patches; right would be a vision "
                "transformer such as CLIP, SigLIP, DINOv2 or ViT"
            )
        architecture = {key: value for key, value in vision.to_diff_dict().items() if key not in _VOLATILE}
        taken: dict[str, Any] = {"architecture": architecture}
        if config.reference is not None:
            taken["reference"] = portable(config.reference)
        if "image" not in config.model_fields_set:
            # Set from here on, so that what is saved opens alike without the reference.
            taken["image"] = _stated_image(config, side)
        self.config = config = config.model_copy(update=taken)
        self.model = _model_class(vision)(vision, **_without_pooling(vision))
        self.requires_grad_(False).eval()
        depth = vision.num_hidden_layers
        if not -depth - 1 <= config.layer <= depth:
            raise RecipeError(f"encoder.layer: {config.layer} is none of the {depth + 1} hidden states")
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self._side, self.patch = side, patch
        self._hidden = config.layer != -1 or not config.final_norm
        self.width = vision.hidden_size
        self.prefix = self._tokens(side, side) - (side // patch) ** 2
        if self.prefix < 0:
            raise RecipeError(f"encoder: {vision.model_type} merges patches, which is not supported")
        self.set_image(config.image)

    def set_image(self, image: ImageConfig) -> None:
        """Positions are interpolated as the model itself does it, where it can."""
        side, patch = image.size, self.patch
        # An image of native size may have any shape; one that is no square shows whether it can.
        for width in [side] + [side + patch] * (image.fit == "native"):
            if (side, width) != (self._side, self._side) and not self._takes(side, width):
                raise RecipeError(
                    f"encoder: {self.model.config.model_type} takes images of {self._side} x {self._side} pixels, not "
                    f"of {width} x {side}; right would be that size, or an encoder whose positions can be "
                    "interpolated (CLIP, SigLIP, ViT, DINOv2)"
                )
        self.config = self.config.model_copy(update={"image": image})
        self.square = (side // patch,) * 2
        self.patches = math.prod(self.square) + (self.prefix if self.config.select == "full" else 0)

    def _takes(self, height: int, width: int) -> bool:
        """Whether such an image gives as many tokens as it has patches (and what stands before them)."""
        if min(height, width) < self.patch:
            return False
        try:
            found = self._tokens(height, width)
        except (ValueError, RuntimeError):
            return False
        return found == self.prefix + (height // self.patch) * (width // self.patch)

    def _tokens(self, height: int, width: int) -> int:
        """Tokens of one image, class and register tokens included: a forward pass that computes nothing."""
        with torch.device("meta"):
            twin = type(self.model)(self.model.config).eval()
            pixels = torch.empty(1, 3, height, width)
        return twin(pixel_values=pixels, **self._options(height, width)).last_hidden_state.shape[1]

    def _options(self, height: int, width: int) -> dict[str, bool]:
        """Of the model's forward, for images of this size."""
        resized = (height, width) != (self._side, self._side)
        return {"interpolate_pos_encoding": True} if resized and self._interpolates else {}

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S], or of another height and width, -> features [B, N, d_enc]."""
        options = self._options(*pixels.shape[-2:])
        output = self.model(pixel_values=pixels.to(self.dtype), output_hidden_states=self._hidden, **options)
        features = output.hidden_states[self.config.layer] if self._hidden else output.last_hidden_state
        return features[:, self.prefix :] if self.config.select == "patch" else features

    def transformers(self) -> list[nn.Module]:
        return [self.model]

    def load_reference(self) -> None:
        """Load the weights that the config's reference names."""
        if self.config.reference is None:
            raise RecipeError("encoder.reference: not set, and no checkpoint carries this encoder's weights")
        self.load_weights(_model_directory(self.config.reference))

    def load_weights(self, directory: Path) -> None:
        """Load the vision model out of a transformers checkpoint, also a composite one, in float32."""
        whole = open_config(directory)
        if whole.model_type in COMPOSITE:
            tensors = CheckpointFiles(directory)
            unused = (SIGLIP_POOLER,) if isinstance(self.model.config, SiglipVisionConfig) else ()
            load_vision_model(self.model, tensors, prefixes=COMPOSITE[whole.model_type], unused=unused)
        else:
            loaded, report = type(self.model).from_pretrained(
                directory,
                config=self.model.config,
                dtype=torch.float32,
                output_loading_info=True,
                **_without_pooling(self.model.config),
            )
            # Unexpected ones are other parts of the checkpoint: a text tower, a classifier.
            lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
            if lacking:
                raise CheckpointError(f"{directory}: lacks or mis-shapes tensors of the vision model: {lacking[:8]}")
            self.model = loaded.requires_grad_(False).eval()
        self.reference_sha256 = self.weights_sha256()


def open_config(directory: Path) -> PreTrainedConfig:
    """The transformers config of a checkpoint directory. Raises ReferenceError_ where transformers can't read it."""
    try:
        return AutoConfig.from_pretrained(
            directory,
            trust_remote_code=False,  # None would ask, on the terminal
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ReferenceError_(f"{directory}/config.json: not a config that transformers knows ({error})") from error


def _vision_config(config: HuggingFaceEncoderConfig) -> PreTrainedConfig:
    """The transformers config of the vision model, also out of a composite one (CLIP, SigLIP, BLIP-2, LLaVA)."""
    if config.architecture is not None:
        fields = dict(config.architecture)
        model_type = str(fields.pop("model_type", None))
        try:
            vision = AutoConfig.for_model(model_type, **fields)
        except ValueError as error:
            raise RecipeError(f"encoder.architecture: unknown model_type {model_type!r}") from error
        except StrictDataclassError as error:
            raise RecipeError(f"encoder.architecture: {error}") from error
    elif config.reference is not None:
        whole = open_config(_model_directory(config.reference, weights=False))
        vision = getattr(whole, "vision_config", whole)
    else:
        raise RecipeError("encoder: needs a reference, or an architecture where a checkpoint carries the weights")
    if isinstance(vision, SiglipVisionConfig):
        vision.vision_use_head = False
    return vision


def _stated_image(config: HuggingFaceEncoderConfig, side: int) -> ImageConfig:
    """The preprocessing that the reference states; at the model's own size where it states none."""
    stated = None
    if config.reference is not None:
        stated = image_config_from(_model_directory(config.reference, weights=False))
        if stated is None:
            _LOGGER.warning("%s states no preprocessing (preprocessor_config.json): taking CLIP's", config.reference)
    return stated or ImageConfig(size=side)


def _model_class(vision: PreTrainedConfig) -> Any:
    if isinstance(vision, Blip2VisionConfig):
        return Blip2VisionModel  # the one vision model here that AutoModel does not know
    if type(vision) not in MODEL_MAPPING:
        raise RecipeError(f"encoder: transformers has no AutoModel for {type(vision).__name__}")
    return MODEL_MAPPING[type(vision)]


def _without_pooling(vision: PreTrainedConfig) -> dict[str, Any]:
    """Leave out the head over the class token: it is no part of the patches, and many checkpoints lack it."""
    if "add_pooling_layer" in inspect.signature(_model_class(vision).__init__).parameters:
        return {"add_pooling_layer": False}
    return {}


def _model_directory(reference: str, *, weights: bool = True) -> Path:
    resolved = resolve(reference, weights=weights)
    if not (resolved.path / "config.json").is_file():
        raise ReferenceError_(f"{reference}: {resolved.path} holds no config.json of a transformers model")
    return resolved.path
