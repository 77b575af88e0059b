"""The visual prompt generator: encoder + connector. It belongs to no LLM.

pixels [B, 3, S, S] -> encode -> patches [B, N, d_enc] -> connect -> visual tokens [B, T, d_vpg]
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from vpgtrans.config import ImageConfig, ResolutionConfig, VPGConfig
from vpgtrans.errors import RecipeError, TransferError
from vpgtrans.layout import Grid, Layout, Layouts
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.connectors import Connector
from vpgtrans.vision.encoders import Encoder
from vpgtrans.vision.preprocess import ImageTransform

AT_ONCE = 64
"""Pieces that go through a frozen VPG together: a few images in many tiles each are more than a batch of images."""


@dataclass(frozen=True)
class _Own:
    """What a VPG came with, which holds where a recipe says nothing else."""

    image: ImageConfig
    limit: int | None


class VPG(nn.Module):
    """An encoder and the connector after it. Features of a frozen encoder may be cached: `connect(encode(pixels))`."""

    def __init__(self, encoder: Encoder, connector: Connector):
        super().__init__()
        if connector.width_in != encoder.width:
            raise TransferError(
                f"the encoder gives {encoder.width} channels, the connector takes {connector.width_in}: they must agree"
            )
        connector.check_grid(there=encoder.grid is not None)
        self.encoder = encoder
        self.connector = connector
        self.transform = ImageTransform(encoder.config.image, patch=encoder.patch)
        self.own = _Own(encoder.config.image, connector.config.limit)

    @property
    def config(self) -> VPGConfig:
        """All that is needed to rebuild it, a limit on its tokens included."""
        return VPGConfig(encoder=self.encoder.config, connector=self.connector.config)

    @property
    def width(self) -> int:
        """d_vpg, the width of a visual token."""
        return self.connector.width

    @property
    def tokens(self) -> int:
        """T, visual tokens of a square: of an image, or of each of its tiles."""
        return self.connector.tokens_of(self._other_grid)

    def fresh_connector(self) -> Connector:
        """A connector like this one, with random weights."""
        width, patches = self.encoder.width, self.connector.patches
        return connectors.build(self.config.connector, width_in=width, patches=patches, grid=self._other_grid)

    @property
    def layouts(self) -> Layouts | None:
        """The layout of an image by its size; None where every image is one square."""
        image = self.encoder.config.image
        if image.fit not in ("tiles", "native"):
            return None
        # A copy: another limit later is not to change what is laid out by this one.
        most = image.max_patches or math.prod(self.encoder.square)
        return Layouts(image, self.tokens, self.encoder.patch, most, copy(self.connector).tokens_of)

    def set_resolution(self, stated: ResolutionConfig) -> None:
        """See images from now on as `stated` and, where that is silent, as the VPG came; weights stay what they are.

        Raises:
            RecipeError: encoder or connector can't, or the keys don't go together.
        """
        encoder, own = self.encoder, self.own
        try:
            image = stated.over(own.image)
        except ValidationError as error:
            raise RecipeError(
                "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
            ) from error
        side = stated.image_size
        if side not in (None, own.image.size) and side % encoder.step:
            right = [size for size in (side - side % encoder.step, side + -side % encoder.step) if size]
            raise RecipeError(
                f"image_size: {side} is no multiple of the encoder's patch, {encoder.step} pixels; right would be "
                f"{' or '.join(map(str, right))}"
            )
        before = encoder.config.image
        try:
            if image != before:
                encoder.set_image(image)
            limit = own.limit if stated.visual_tokens is None else stated.visual_tokens
            self.connector.limit(limit, grid=self._other_grid)
        except RecipeError:
            encoder.set_image(before)
            raise
        self.transform = ImageTransform(image, patch=encoder.patch)

    @property
    def _other_grid(self) -> Grid | None:
        """Of the patches of a square, where the connector was made for another one."""
        return self.encoder.square if self.encoder.patches != self.connector.patches else None

    def pieces(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> Tensor | list[Tensor]:
        """What of opened images goes through the VPG: uint8 [m, 3, S, S], or m of any shapes in their native size."""
        pieces = [self.transform.pieces(image, layout) for image, layout in zip(images, layouts, strict=True)]
        return [piece for some in pieces for piece in some] if self.native else torch.cat(pieces)

    @property
    def native(self) -> bool:
        """Whether images come in their own shapes."""
        return self.encoder.config.image.fit == "native"

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> patches [B, N, d_enc]."""
        return self.encoder(pixels)

    def connect(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Patches [B, N, d_enc] -> visual tokens [B, T, d_vpg]; grid: theirs, if they are of no square."""
        return self.connector(features, grid or self._other_grid)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> visual tokens [B, T, d_vpg]; H and W are S, or of an image in its native size."""
        return self.connect(self.encode(pixels), self.grid_of(pixels))

    def grid_of(self, pixels: Tensor) -> Grid | None:
        """Rows and columns of patches of images [B, 3, H, W]; None: those of a square."""
        height, width = pixels.shape[-2:]
        if height == width == self.encoder.config.image.size:
            return None
        return height // self.encoder.patch, width // self.encoder.patch


def of_pieces(pieces: Tensor | Sequence[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What a VPG, or a part of it, makes of images' pieces.

    Args:
        pieces: [m, 3, S, S], or m of any shapes [3, H, W], which go together where they are alike.
        compute: [B, 3, H, W] -> [B, T, d].

    Returns:
        [m, T, d]; of pieces of any shapes, whose T differ, [sum of T, d] in order.
    """
    if isinstance(pieces, Tensor):
        return compute(pieces)
    places: dict[tuple[int, ...], list[int]] = {}
    for place, piece in enumerate(pieces):
        places.setdefault(tuple(piece.shape), []).append(place)
    found: dict[int, Tensor] = {}
    for alike in places.values():
        found |= zip(alike, compute(torch.stack([pieces[place] for place in alike])), strict=True)
    return torch.cat([found[place] for place in range(len(pieces))])


def in_turns(pieces: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """As `compute` of all pieces [m, …], where nothing trains: `AT_ONCE` of them at a time."""
    return torch.cat([compute(some) for some in pieces.split(AT_ONCE)])


def build_vpg(config: VPGConfig, *, load_weights: bool = True) -> VPG:
    """Build a VPG: the encoder with its reference's weights (unless told not to), the connector random.

    Random weights come from torch's global generator: seed it, or use `torch.random.fork_rng`.
    """
    encoder = encoders.build(config.encoder, load_weights=load_weights)
    connector = connectors.build(config.connector, width_in=encoder.width, patches=encoder.patches)
    return VPG(encoder, connector)
