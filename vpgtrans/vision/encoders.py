"""Vision encoders: pixels [B, 3, S, S] -> patch features [B, N, d_enc].

An encoder is frozen when it is built, and what is frozen stays in eval mode through `.train()`.
"""

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
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

from vpgtrans.checkpoint_files import CheckpointFiles, read_pickle
from vpgtrans.config import (
    ConcatEncoderConfig,
    EfficientNetLite0Config,
    EncoderConfig,
    HuggingFaceEncoderConfig,
    ImageConfig,
)
from vpgtrans.errors import CheckpointError, IntegrityError, RecipeError, ReferenceError_
from vpgtrans.parts import load_strict, tensors_sha256
from vpgtrans.references import file_sha256, portable, resolve
from vpgtrans.vision.grid import average
from vpgtrans.vision.preprocess import image_config_from
from vpgtrans.vision.tensors import load_vision_model

_LOGGER = logging.getLogger(__name__)

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the ImageNet weights that the default reference of EfficientNet-Lite0 carries."""


COMPOSITE = {
    "blip-2": ("vision_model.", "model.vision_model."),
    "llava": ("vision_tower.", "model.vision_tower."),
}
"""Where composite checkpoints keep the vision model, by model_type, where its own class would not find it."""

SIGLIP_POOLER = "head"
"""SigLIP's module that pools the patches into one vector, which nothing here takes: it is never built."""

_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "architectures")
"""Fields of a transformers config that say nothing about the architecture."""


class Encoder(nn.Module, ABC):
    """Base class.

    Attributes:
        config: complete enough to rebuild the encoder. width: d_enc. patches: N, of a square of `config.image.size`.
        patch: side in pixels of one. square: rows and columns of patches of such a square.
        reference_sha256: `weights_sha256()` right after loading the reference, in float32; None if nothing was loaded.
    """

    config: EncoderConfig
    width: int
    patches: int
    patch: int
    square: tuple[int, int]
    reference_sha256: str | None = None

    @abstractmethod
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> features [B, N, d_enc] in the encoder's dtype."""

    @abstractmethod
    def load_reference(self) -> None:
        """Load the weights that the config's reference names."""

    @abstractmethod
    def set_image(self, image: ImageConfig) -> None:
        """Take images of another size or fit from now on, with the same weights.

        Raises:
            RecipeError: it can't.
        """

    @property
    def grid(self) -> tuple[int, int] | None:
        """`square`; None where other tokens (a class token) are among the patches."""
        return self.square if math.prod(self.square) == self.patches else None

    @property
    def step(self) -> int:
        """Sides of images are multiples of this many pixels."""
        return self.patch

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def train(self, mode: bool = True) -> "Encoder":
        """Training mode only where something trains; batch norms keep their ImageNet statistics in any case."""
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def weights_sha256(self) -> str:
        """`tensors_sha256` of all tensors as they are now."""
        return tensors_sha256(self.state_dict())


class EfficientNetLite0(Encoder):
    """EfficientNet-Lite0 (arXiv 1905.11946 without squeeze-excite), cut before its classifier.

    `levels` names the feature maps: -1 is the head (1,280 channels, stride 32), 0 to 15 are block outputs (blocks 0,
    2, 4, 10 and 15 are the last at strides 2, 4, 8, 16 and 32). All are brought to the grid of the level named first,
    by adaptive average pooling (which repeats pixels where a map is coarser), and laid side by side as channels.
    With `fold` k a map that is at least k times as fine is averaged to a k times finer grid, whose k x k pixels become
    channels (a pixel unshuffle): details at no more patches.
    """

    config: EfficientNetLite0Config

    def __init__(self, config: EfficientNetLite0Config):
        super().__init__()
        self.config = config
        try:
            from efficientnet_lite_pytorch import EfficientNet  # here: only this encoder needs it, others' users don't
        except ImportError as error:
            raise ReferenceError_(
                "the encoder efficientnet-lite0 needs its model code: pip install --no-deps efficientnet-lite-pytorch"
            ) from error
        self._family = EfficientNet
        _refuse_native(config)
        # The size fixes the TensorFlow-style "same" padding of every convolution.
        self.model = EfficientNet.from_name("efficientnet-lite0", image_size=config.image.size)
        blocks = len(self.model._blocks)
        if not config.levels or any(not -1 <= level < blocks for level in config.levels):
            raise RecipeError(f"encoder.levels: {list(config.levels)} must name blocks 0 to {blocks - 1}, or -1")
        self.model._fc = nn.Identity()
        self.model.to(memory_format=torch.channels_last)  # 1.4 to 2 times as fast on a CPU
        self.requires_grad_(False).eval()
        self._measure()

    def _measure(self) -> None:
        side = self.config.image.size
        with torch.no_grad():
            features = self(torch.zeros(1, 3, side, side, device=next(self.parameters()).device))
        self.patches, self.width = features.shape[1:]
        self.square = (math.isqrt(self.patches),) * 2
        self.patch = side // self.square[0]

    @property
    def step(self) -> int:
        return 1  # its padding is made for any size

    def set_image(self, image: ImageConfig) -> None:
        """A model made for the size, with this one's tensors: exactly what it would have been from the start."""
        config = self.config.model_copy(update={"image": image})
        _refuse_native(config)
        if image.size != self.config.image.size:
            model = self._family.from_name("efficientnet-lite0", image_size=image.size)
            model._fc = nn.Identity()
            trains = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
            model.load_state_dict(self.model.state_dict(keep_vars=True), assign=True)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trains[name])  # assigning has switched it on
            self.model = model.to(memory_format=torch.channels_last)
            self.train(self.training)  # before it measures: a batch norm in training would learn from that
            self.config = config
            self._measure()
        self.config = config

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> features [B, h*w, c], row by row."""
        model, levels = self.model, self.config.levels
        maps: dict[int, Tensor] = {}
        pixels = pixels.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = model._swish(model._bn0(model._conv_stem(pixels)))
        for index, block in enumerate(model._blocks):
            x = block(x)
            maps[index] = x
        if -1 in levels:
            maps[-1] = model._swish(model._bn1(model._conv_head(x)))
        height, width = maps[levels[0]].shape[-2:]
        pooled = []
        for level in levels:
            # Strides round up: a map that is twice as fine may be a pixel short of twice the grid.
            fold = self.config.fold if round(maps[level].shape[-1] / width) >= self.config.fold else 1
            finer = F.adaptive_avg_pool2d(maps[level], (height * fold, width * fold))
            pooled.append(F.pixel_unshuffle(finer, fold))
        return torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)

    def load_reference(self) -> None:
        """Load the weights that the config's reference names; a pickle is read as plain tensors only."""
        path = _weights_file(self.config.reference)
        if self.config.reference == EfficientNetLite0Config().reference and file_sha256(path) != LITE0_SHA256:
            raise IntegrityError(f"{path}: its sha256 differs from that of EfficientNet-Lite0's weights {LITE0_SHA256}")
        state = read_pickle(path)
        kept = {name: tensor for name, tensor in state.items() if name not in ("_fc.weight", "_fc.bias")}
        load_strict(self.model, kept, where=str(path))
        self.reference_sha256 = self.weights_sha256()


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


class ConcatEncoder(Encoder):
    """Encoders side by side (Prismatic, arXiv 2402.07865: DINOv2 and SigLIP): d_enc is the sum of theirs.

    Prismatic's two have the same patches; here they may differ, and are brought to the first one's.
    """

    config: ConcatEncoderConfig
    mean: Tensor
    std: Tensor

    def __init__(self, config: ConcatEncoderConfig):
        super().__init__()
        encoders = [_one(each) for each in config.encoders]
        self.encoders = nn.ModuleList(encoders)
        self.config = _concat(encoders)
        first = encoders[0].config.image
        for index, encoder in enumerate(encoders):
            if encoder.grid is None:
                raise RecipeError(f"encoder.encoders.{index}: a class token stands among its patches, so they can't be "
                                  "joined with others; right would be select: patch")  # fmt: skip
            image = encoder.config.image.model_copy(update={"mean": first.mean, "std": first.std})
            differ = {key: (value, getattr(first, key)) for key, value in image if value != getattr(first, key)}
            if differ:
                said = "; ".join(f"{key} is {value}, the first one's {own}" for key, (value, own) in differ.items())
                raise RecipeError(f"encoder.encoders.{index}.image: {said}; all encoders see one resized image, so "
                                  "right would be the same in both but for mean and std")  # fmt: skip
        if first.fit == "native":
            self.set_image(first)  # refuses it
        self.width = sum(encoder.width for encoder in encoders)
        self._take_first()
        for name in ("mean", "std"):
            values = torch.tensor([getattr(encoder.config.image, name) for encoder in encoders])
            self.register_buffer(name, values[:, :, None, None], persistent=False)

    @property
    def _all(self) -> list[Encoder]:
        return cast(list[Encoder], list(self.encoders))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] -> features [B, N, d_enc]."""
        maps = []
        for encoder, mean, std in zip(self._all, self.mean, self.std, strict=True):
            assert encoder.grid is not None
            maps.append(encoder((pixels - mean) / std).unflatten(1, encoder.grid))
        first = (maps[0].shape[1], maps[0].shape[2])
        return torch.cat([average(each, first) for each in maps], dim=3).flatten(1, 2)

    def load_reference(self) -> None:
        """Load what every encoder's reference names."""
        for encoder in self._all:
            encoder.load_reference()
        self.reference_sha256 = self.weights_sha256()

    @property
    def step(self) -> int:
        return math.lcm(*(encoder.step for encoder in self._all))

    def set_image(self, image: ImageConfig) -> None:
        """All of them, each with its own mean and deviation."""
        if image.fit == "native":
            raise RecipeError("encoder: concat brings all patches to one square, so fit: native is not for it; right "
                              "would be tiles")  # fmt: skip
        for encoder in self._all:
            own = encoder.config.image
            encoder.set_image(image.model_copy(update={"mean": own.mean, "std": own.std}))
        self.config = _concat(self._all)
        self._take_first()

    def _take_first(self) -> None:
        first = self._all[0]
        self.patches, self.patch, self.square = first.patches, first.patch, first.square


def _concat(encoders: Sequence[Encoder]) -> ConcatEncoderConfig:
    return ConcatEncoderConfig.model_validate({"encoders": [encoder.config for encoder in encoders]})


def _refuse_native(config: EfficientNetLite0Config) -> None:
    if config.image.fit == "native":
        raise RecipeError(
            "encoder: efficientnet-lite0 is built for squares of one size, so fit: native is not for it; right would "
            "be tiles, or a vision transformer (CLIP, SigLIP, ViT, DINOv2)"
        )


def build(config: EncoderConfig, *, load_weights: bool = True) -> Encoder:
    """A frozen encoder in float32, with its reference's weights or (`load_weights=False`) random ones.

    Raises:
        RecipeError: the config doesn't fit the architecture, or there is no reference to load from.
        ReferenceError_: the reference doesn't resolve. CheckpointError, IntegrityError: its weights are not right.
    """
    encoder = ConcatEncoder(config) if isinstance(config, ConcatEncoderConfig) else _one(config)
    if load_weights:
        encoder.load_reference()
    return encoder


def _one(config: HuggingFaceEncoderConfig | EfficientNetLite0Config) -> HuggingFaceEncoder | EfficientNetLite0:
    """A single encoder with random weights."""
    return HuggingFaceEncoder(config) if isinstance(config, HuggingFaceEncoderConfig) else EfficientNetLite0(config)


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


def _weights_file(reference: str) -> Path:
    path = resolve(reference).path
    if not path.is_file():
        raise ReferenceError_(f"{reference}: {path} is a directory; name the one file of weights")
    return path
