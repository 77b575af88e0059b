"""What all encoders share: their shapes, other sizes of images, and that what is frozen stays in eval mode."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vpgtrans.config import EncoderConfig, ImageConfig
from vpgtrans.layout import Grid
from vpgtrans.parts import tensors_sha256


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
    square: Grid
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
    def grid(self) -> Grid | None:
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

    def transformers(self) -> list[nn.Module]:
        """The vision transformers of `transformers` that it holds, if any: what can be adapted and checkpointed."""
        return []

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
