"""Several encoders side by side, as one."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vpgtrans.config import ConcatEncoderConfig, ImageConfig
from vpgtrans.errors import RecipeError
from vpgtrans.vision.encoders.base import Encoder
from vpgtrans.vision.grid import average


class ConcatEncoder(Encoder):
    """Encoders side by side (Prismatic, arXiv 2402.07865: DINOv2 and SigLIP): d_enc is the sum of theirs.

    Prismatic's two have the same patches; here they may differ, and are brought to the first one's.
    """

    config: ConcatEncoderConfig
    mean: Tensor
    std: Tensor

    def __init__(self, encoders: Sequence[Encoder]):
        super().__init__()
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

    def transformers(self) -> list[nn.Module]:
        return [model for encoder in self._all for model in encoder.transformers()]

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
