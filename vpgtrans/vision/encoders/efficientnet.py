"""EfficientNet-Lite0, a small convolutional network whose weights a Python distribution carries."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpgtrans.checkpoint_files import read_pickle
from vpgtrans.config import EfficientNetLite0Config, ImageConfig
from vpgtrans.errors import IntegrityError, RecipeError, ReferenceError_
from vpgtrans.parts import load_strict
from vpgtrans.references import file_sha256, resolve
from vpgtrans.vision.encoders.base import Encoder

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the ImageNet weights that the default reference of EfficientNet-Lite0 carries."""


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


def _refuse_native(config: EfficientNetLite0Config) -> None:
    if config.image.fit == "native":
        raise RecipeError(
            "encoder: efficientnet-lite0 is built for squares of one size, so fit: native is not for it; right would "
            "be tiles, or a vision transformer (CLIP, SigLIP, ViT, DINOv2)"
        )


def _weights_file(reference: str) -> Path:
    path = resolve(reference).path
    if not path.is_file():
        raise ReferenceError_(f"{reference}: {path} is a directory; name the one file of weights")
    return path
