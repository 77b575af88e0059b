"""Connectors: patch features [B, N, d_enc] -> visual tokens [B, T, d_vpg]. docs/connectors.md compares them."""

from collections.abc import Callable
from typing import Any

from vpgtrans.config import ConnectorConfig
from vpgtrans.layout import Grid
from vpgtrans.vision.connectors.base import Connector
from vpgtrans.vision.connectors.grids import GridConnector, Identity, Merge, PixelShuffle, Pool, PooledQueries
from vpgtrans.vision.connectors.queries import CrossAttention, QFormer, QueryConnector, Resampler, ResamplerLayer

__all__ = [
    "Connector",
    "CrossAttention",
    "GridConnector",
    "Identity",
    "Merge",
    "PixelShuffle",
    "Pool",
    "PooledQueries",
    "QFormer",
    "QueryConnector",
    "Resampler",
    "ResamplerLayer",
    "build",
]

_KINDS: dict[str, Callable[..., Connector]] = {
    "qformer": QFormer,
    "resampler": Resampler,
    "cross-attention": CrossAttention,
    "identity": Identity,
    "merge": Merge,
    "pixel-shuffle": PixelShuffle,
    "pool": Pool,
    "pooled-queries": PooledQueries,
}


def build(config: ConnectorConfig, *, width_in: int, patches: int, grid: Grid | None = None) -> Connector:
    """A connector with random weights for an encoder of `width_in` channels and `patches` patches an image.

    grid: rows and columns of the patches that will come in, where these are others than it is made for.

    Raises:
        RecipeError: the config asks for more tokens than there are, or for a grid where there is none.
    """
    fields: dict[str, Any] = {"width_in": width_in, "patches": patches}
    connector = _KINDS[config.kind](config, **fields)
    connector.limit(config.limit, grid=grid)
    return connector
