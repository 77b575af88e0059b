"""What all connectors share: how many visual tokens, for which grid of patches, and how patches come in."""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpgtrans.config import (
    ConnectorConfig,
    CrossAttentionConnectorConfig,
    PooledQueriesConnectorConfig,
    QFormerConnectorConfig,
    ResamplerConnectorConfig,
)
from vpgtrans.errors import RecipeError

Grid = tuple[int, int]
"""Rows and columns."""

AttentionConfig = (
    QFormerConnectorConfig | ResamplerConnectorConfig | CrossAttentionConnectorConfig | PooledQueriesConnectorConfig
)

SMALLEST_DEVIATION = 0.2
"""Of the channels' mean one: a channel that is silent in the images measured is not blown up where it speaks."""


class Connector(nn.Module, ABC):
    """Base class. Patches are made for one grid, and may come in another one that is then named.

    Attributes:
        config: with the `limit` in force. width_in: d_enc. width: d_vpg. patches: N, what it was made for, and
        grid: the rows and columns they stand in; None where they don't (a class token is among them).
        mean, deviation: [d_enc] of the patches, see `measure`; None if the config doesn't ask for them.
    """

    config: ConnectorConfig
    mean: Tensor | None
    deviation: Tensor | None

    def __init__(self, config: ConnectorConfig, *, width_in: int, patches: int, width: int):
        super().__init__()
        self.config = config
        self.width_in, self.patches, self.width = width_in, patches, width
        side = math.isqrt(patches)
        self.grid: Grid | None = (side, side) if side * side == patches else None
        self.register_buffer("mean", torch.zeros(width_in) if config.standardised else None)
        self.register_buffer("deviation", torch.ones(width_in) if config.standardised else None)

    @abstractmethod
    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, T, d_vpg].

        grid: rows and columns of these patches; None: the square that the connector was made for.
        """

    @abstractmethod
    def tokens_of(self, grid: Grid | None = None) -> int:
        """Visual tokens of an image whose patches stand in `grid`; None: what the connector was made for."""

    @property
    def tokens(self) -> int:
        """T, visual tokens of an image whose patches are what the connector was made for."""
        return self.tokens_of()

    @property
    def square(self) -> Grid:
        """`grid`, where there must be one."""
        assert self.grid is not None, "made for no grid: `build` refuses that"
        return self.grid

    @property
    def needs_grid(self) -> bool:
        """Whether patches must stand in rows and columns, without a class token among them."""
        return False

    def limit(self, tokens: int | None) -> None:
        """From now on an image gets only `tokens` visual tokens; None: all there are. It is saved with the connector.

        Raises:
            RecipeError: there can't be so many.
        """
        before = self.config
        self.config = before.model_copy(update={"limit": tokens})
        try:
            self.check_grid(there=self.grid is not None)
            if tokens is not None and self.tokens != tokens:
                raise RecipeError(
                    f"connector: {before.kind} can't give {tokens} visual tokens; right would be {self._possible()}"
                )
        except RecipeError:
            self.config = before
            raise

    def check_grid(self, *, there: bool) -> None:
        """Raises RecipeError where the connector needs rows and columns of patches and they aren't `there`."""
        if self.needs_grid and not there:
            why = " with a limit" if self.config.limit is not None else ""
            raise RecipeError(
                f"connector: {self.config.kind}{why} needs patches in rows and columns, but among the encoder's "
                f"{self.patches} tokens is a class token or another one; right would be encoder.select: patch"
            )

    @abstractmethod
    def _possible(self) -> str:
        """The limits that can be set, in words."""

    @torch.no_grad()
    def measure(self, features: Tensor) -> None:
        """Take mean and deviation of each channel from the features [B, N, d_enc] of some training images."""
        assert self.mean is not None, "made without `standardised`"
        assert self.deviation is not None
        deviation, mean = torch.std_mean(features.float().flatten(0, 1), dim=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=(SMALLEST_DEVIATION * deviation.mean()).clamp(min=1e-6)))

    def standardised(self, features: Tensor) -> Tensor:
        """Features [B, N, d_enc] in the connector's dtype, each channel of mean 0 and deviation 1 if asked for."""
        dtype = next(self.parameters(), features).dtype
        if self.mean is not None and self.deviation is not None:
            features = (features.float() - self.mean) / self.deviation  # in float32: means may be many deviations
        return features.to(dtype)


def fit(grid: Grid, tokens: int, *, most: Grid) -> Grid:
    """The largest grid of the shape of `grid` with at most `tokens` places, no side of it longer than `most`'s.

    Of a square and a square number it is the root; `most` itself where that has few enough places.
    """
    if most[0] * most[1] <= tokens:
        return most
    rows = max(1, min(most[0], math.isqrt(tokens * grid[0] // grid[1]), tokens))
    return rows, max(1, min(most[1], math.isqrt(tokens * grid[1] // grid[0]), tokens // rows))


def average(features: Tensor, grid: Grid) -> Tensor:
    """Features [B, r, c, d] averaged to another grid, [B, *grid, d]; every place averages what it covers."""
    if tuple(features.shape[1:3]) == grid:
        return features
    return F.adaptive_avg_pool2d(features.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)


def sincos(like: Tensor, grid: Grid, *, frame: Grid) -> Tensor:
    """Positions [rows * columns, width] of the places of a grid, for tokens `like` [B, N, width].

    A quarter of the channels each are sines and cosines of the row, then of the column, as of a transformer's positions
    (arXiv 1706.03762). A place counts by its centre, in units of `frame`'s places: another grid over the same image
    has its places between those of `frame`. (Qwen-VL interpolates a table to the same end.)
    """
    width = like.shape[-1]
    frequencies = 10000 ** -(torch.arange(width // 4, device=like.device) / (width // 4))
    parts = []
    for axis, shape in ((0, (-1, 1)), (1, (1, -1))):
        centres = (torch.arange(grid[axis], device=like.device) + 0.5) * (frame[axis] / grid[axis]) - 0.5
        angles = centres.view(*shape, 1) * frequencies
        parts += [angles.sin().expand(*grid, -1), angles.cos().expand(*grid, -1)]
    return torch.cat(parts, dim=-1).flatten(0, 1).to(like.dtype)


def check_attention(config: AttentionConfig, *, positions: bool = False) -> None:
    """Raises RecipeError where a width can't be shared among heads, or among sines and cosines of rows and columns."""
    if config.width % config.heads:
        raise RecipeError(f"connector: width {config.width} must be a multiple of heads {config.heads}")
    if positions and config.width % 4:
        raise RecipeError(f"connector: width {config.width} must be a multiple of 4 for sines and cosines of positions")


def feed_forward(width: int, hidden: int, *, dropout: float) -> nn.Sequential:
    """The second half of a transformer's layer, its norm in front."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
    )
