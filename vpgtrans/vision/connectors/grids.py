"""Connectors that keep the patches' rows and columns, at fewer places: each token is of one region of the image."""

import math
from abc import abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from vpgtrans.config import (
    IdentityConnectorConfig,
    MergeConnectorConfig,
    PixelShuffleConnectorConfig,
    PoolConnectorConfig,
    PooledQueriesConnectorConfig,
)
from vpgtrans.errors import RecipeError
from vpgtrans.layout import Grid
from vpgtrans.vision.connectors.base import Connector, check_attention, feed_forward
from vpgtrans.vision.grid import average, fit, sincos


class GridConnector(Connector):
    """Rows and columns of patches -> rows and columns of visual tokens; where a limit is below that, averaged to it.

    On a grid that is no square the limit is the most there may be, in the image's own shape.
    """

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, T, d_vpg], row by row."""
        grid = grid or self.square
        tokens = self.compress(self.standardised(features).unflatten(1, grid))
        return average(tokens, self.shape(grid)).flatten(1, 2)

    @abstractmethod
    def compress(self, features: Tensor) -> Tensor:
        """Features [B, r, c, d_enc] -> visual tokens [B, r', c', d_vpg]: of `whole`'s shape, or `shape`'s already."""

    @abstractmethod
    def whole(self, grid: Grid) -> Grid:
        """Rows and columns of the visual tokens of a grid of patches where there is no limit."""

    def shape(self, grid: Grid) -> Grid:
        """As `whole`, within the limit."""
        whole = self.whole(grid)
        return whole if self.config.limit is None else fit(grid, self.config.limit, most=whole)

    def tokens_of(self, grid: Grid | None = None) -> int:
        return math.prod(self.shape(grid or self.square))

    @property
    def needs_grid(self) -> bool:
        return True

    def _possible(self, grid: Grid | None) -> str:
        grid = grid or self.square
        return possible(grid, self.whole(grid))


def possible(grid: Grid, most: Grid) -> str:
    """The numbers of tokens that `fit` gives when asked for them, in words."""
    exact = [n for n in range(1, math.prod(most) + 1) if math.prod(fit(grid, n, most=most)) == n]
    return f"one of {', '.join(map(str, exact))}"


class Identity(GridConnector):
    """Patch features as they are (LLaVA, arXiv 2304.08485): T = N, d_vpg = d_enc. A class token may be among them."""

    config: IdentityConnectorConfig

    def __init__(self, config: IdentityConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, width=width_in)

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc], unchanged unless standardised or limited."""
        return super().forward(features, grid) if self.needs_grid else self.standardised(features)

    def compress(self, features: Tensor) -> Tensor:
        return features

    def whole(self, grid: Grid) -> Grid:
        return grid

    def tokens_of(self, grid: Grid | None = None) -> int:
        if self.needs_grid:
            return super().tokens_of(grid)
        others = self.patches - math.isqrt(self.patches) ** 2
        return self.patches if grid is None else math.prod(grid) + others

    @property
    def needs_grid(self) -> bool:
        return self.config.limit is not None


def blocks(features: Tensor, window: Grid) -> Tensor:
    """Features [B, r, c, d] -> [B, r/h, c/w, h*w*d]: the neighbours of an h x w window side by side as channels.

    They are in the order of reading. What a window lacks at the right or lower edge is zeros.
    """
    (rows, columns), (high, wide) = features.shape[1:3], window
    features = F.pad(features, (0, 0, 0, -columns % wide, 0, -rows % high))
    return features.unflatten(2, (-1, wide)).unflatten(1, (-1, high)).transpose(2, 3).flatten(3)


class Merge(GridConnector):
    """Adjacent patches become one token by a linear layer (MiniGPT-v2, arXiv 2310.09478: four in a row).

    Its four are the next ones in the sequence, whatever row they are in; here they are of one row, or of a window of
    several (Qwen2-VL, arXiv 2409.12191: 2 x 2).
    """

    config: MergeConnectorConfig

    def __init__(self, config: MergeConnectorConfig, *, width_in: int, patches: int):
        width = config.width or width_in
        super().__init__(config, width_in=width_in, patches=patches, width=width)
        self.linear = nn.Linear(math.prod(config.window) * width_in, width)

    def compress(self, features: Tensor) -> Tensor:
        return self.linear(blocks(features, self.config.window))

    def whole(self, grid: Grid) -> Grid:
        high, wide = self.config.window
        return -(-grid[0] // high), -(-grid[1] // wide)


class PixelShuffle(GridConnector):
    """k x k patches side by side as channels of one token (SmolVLM, arXiv 2504.05299; Idefics3, arXiv 2408.12637).

    d_vpg = k * k * d_enc: nothing is lost and nothing trains, the projector does the rest. With `width` a linear layer
    comes first.
    """

    config: PixelShuffleConnectorConfig

    def __init__(self, config: PixelShuffleConnectorConfig, *, width_in: int, patches: int):
        channels = config.factor**2 * width_in
        super().__init__(config, width_in=width_in, patches=patches, width=config.width or channels)
        self.linear = nn.Identity() if config.width is None else nn.Linear(channels, config.width)

    def compress(self, features: Tensor) -> Tensor:
        return self.linear(blocks(features, (self.config.factor, self.config.factor)))

    def whole(self, grid: Grid) -> Grid:
        return -(-grid[0] // self.config.factor), -(-grid[1] // self.config.factor)


class _Pooling(GridConnector):
    """Connectors whose config says how many tokens patches are pooled to."""

    config: PoolConnectorConfig | PooledQueriesConnectorConfig

    def __init__(self, config: PoolConnectorConfig | PooledQueriesConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, width=config.width)
        if self.grid is not None and math.prod(self.whole(self.grid)) != config.tokens:
            raise RecipeError(
                f"connector.tokens: {patches} patches can't be pooled to {config.tokens}; right would be "
                f"{possible(self.grid, self.grid)}"
            )

    def whole(self, grid: Grid) -> Grid:
        return fit(grid, self.config.tokens, most=grid)


class Pool(_Pooling):
    """Adaptive average pooling, then an MLP of two layers (Open-Qwen2VL, arXiv 2504.00595: 729 patches to 144)."""

    config: PoolConnectorConfig

    def __init__(self, config: PoolConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches)
        hidden = config.hidden or config.width
        self.mlp = nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, config.width))

    def compress(self, features: Tensor) -> Tensor:
        rows, columns = features.shape[1:3]
        return self.mlp(average(features, self.shape((rows, columns))))


class PooledQueries(_Pooling):
    """The image at low resolution asks the image at high resolution.

    Mini-Gemini (arXiv 2403.18814) and CogAgent (arXiv 2312.08914) take the queries from a second encoder at a lower
    resolution, and CogAgent asks in every layer of the LLM. Here one encoder serves both: queries are its patches,
    averaged, and one transformer layer with fixed positions on both sides (a region finds its own patches) asks once.
    """

    config: PooledQueriesConnectorConfig

    def __init__(self, config: PooledQueriesConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches)
        check_attention(config, positions=True)
        self.entry = nn.Linear(width_in, config.width)
        self.norm_patches = nn.LayerNorm(config.width)
        self.norm_queries = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, dropout=config.dropout, batch_first=True)
        self.feed_forward = feed_forward(config.width, config.hidden, dropout=config.dropout)

    def compress(self, features: Tensor) -> Tensor:
        rows, columns = features.shape[1:3]
        grid, shape = (rows, columns), self.shape((rows, columns))
        patches = self.entry(features)
        queries, patches = average(patches, shape).flatten(1, 2), self.norm_patches(patches).flatten(1, 2)
        keys = patches + sincos(patches, grid, frame=self.square)
        asked = self.norm_queries(queries) + sincos(queries, shape, frame=self.square)
        queries = queries + self.attention(asked, keys, patches, need_weights=False)[0]
        return (queries + self.feed_forward(queries)).unflatten(1, shape)
