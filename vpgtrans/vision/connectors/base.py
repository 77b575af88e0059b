"""What all connectors share: how many visual tokens, for which grid of patches, and how patches come in."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vpgtrans.config import (
    ConnectorConfig,
    CrossAttentionConnectorConfig,
    PooledQueriesConnectorConfig,
    QFormerConnectorConfig,
    ResamplerConnectorConfig,
)
from vpgtrans.errors import RecipeError
from vpgtrans.layout import Grid

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

    def limit(self, tokens: int | None, *, grid: Grid | None = None) -> None:
        """From now on an image gets only `tokens` visual tokens; None: all there are. It is saved with the connector.

        grid: of the patches that come in, as in `forward`.

        Raises:
            RecipeError: there can't be so many.
        """
        before = self.config
        self.config = before.model_copy(update={"limit": tokens})
        try:
            self.check_grid(there=self.grid is not None)
            if tokens is not None and self.tokens_of(grid) != tokens:
                right = self._possible(grid)
                raise RecipeError(f"connector: {before.kind} can't give {tokens} visual tokens; right would be {right}")
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
    def _possible(self, grid: Grid | None) -> str:
        """The limits that can be set where patches stand in `grid`, in words."""

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
