"""Connectors whose visual tokens are learned queries that look at all patches; a limit takes the first of them.

So queries are nested, as in the Matryoshka query transformer (arXiv 2405.19315): trained with several limits, the first
ones carry most.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vpgtrans.config import CrossAttentionConnectorConfig, QFormerConnectorConfig, ResamplerConnectorConfig
from vpgtrans.layout import Grid
from vpgtrans.vision.connectors.base import Connector, check_attention, feed_forward
from vpgtrans.vision.grid import sincos

INITIAL_STD = 0.02
"""Of learned queries and positions, as in BERT and BLIP-2."""


class QueryConnector(Connector):
    """What connectors with learned queries share: the queries, and learned positions of the patches."""

    config: QFormerConnectorConfig | ResamplerConnectorConfig | CrossAttentionConnectorConfig

    def __init__(
        self,
        config: QFormerConnectorConfig | ResamplerConnectorConfig | CrossAttentionConnectorConfig,
        *,
        width_in: int,
        patches: int,
        positions: bool,
    ):
        super().__init__(config, width_in=width_in, patches=patches, width=config.width)
        check_attention(config, positions=self.needs_grid)
        self.queries = nn.Parameter(torch.randn(1, config.queries, config.width) * INITIAL_STD)
        self.positions = nn.Parameter(torch.randn(1, patches, width_in) * INITIAL_STD) if positions else None

    def tokens_of(self, grid: Grid | None = None) -> int:
        return min(self.config.queries, self.config.limit or self.config.queries)

    def _possible(self, grid: Grid | None) -> str:
        return f"at most the number of queries, {self.config.queries}"

    def asking(self, features: Tensor) -> Tensor:
        """The queries [B, T, width] for features [B, N, d_enc]: the first ones, where there is a limit."""
        return self.queries[:, : self.tokens].expand(len(features), -1, -1)

    def placed(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc] in the connector's dtype, standardised and with their positions added."""
        features = self.standardised(features)
        return features if self.positions is None else features + self._positions(features.shape[1], grid)

    def _positions(self, count: int, grid: Grid | None) -> Tensor:
        """Positions [1, count, d_enc], interpolated to another grid as vision transformers do; others stay in front."""
        assert self.positions is not None
        if grid is None or (grid == self.grid and count == self.patches):
            return self.positions
        others = count - grid[0] * grid[1]
        side = math.isqrt(self.patches - others)
        table = self.positions[:, others:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        placed = F.interpolate(table.float(), size=grid, mode="bicubic", align_corners=False).to(table.dtype)
        return torch.cat([self.positions[:, :others], placed.flatten(2).transpose(1, 2)], dim=1)


class QFormer(QueryConnector):
    """BLIP-2's Q-Former (arXiv 2301.12597), the vision half, as transformers implements it."""

    config: QFormerConnectorConfig

    def __init__(self, config: QFormerConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, positions=config.positions)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=config.hidden,
                hidden_act=config.activation,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                layer_norm_eps=config.layer_norm_eps,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=width_in,
            )
        )

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, queries, width]."""
        seen = self.placed(features, grid)
        return self.qformer(query_embeds=self.asking(features), encoder_hidden_states=seen).last_hidden_state


class ResamplerLayer(nn.Module):
    """One layer of a perceiver resampler: queries attend to patches and queries, then a feed-forward layer."""

    def __init__(self, config: ResamplerConnectorConfig):
        super().__init__()
        self.norm_patches = nn.LayerNorm(config.width)
        self.norm_queries = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, dropout=config.dropout, batch_first=True)
        self.feed_forward = feed_forward(config.width, config.hidden, dropout=config.dropout)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """Queries [B, T, width] attending to patches [B, N, width]."""
        normed = self.norm_queries(queries)
        seen = torch.cat([self.norm_patches(patches), normed], dim=1)
        queries = queries + self.attention(normed, seen, seen, need_weights=False)[0]
        return queries + self.feed_forward(queries)


class Resampler(QueryConnector):
    """Perceiver resampler (Flamingo, arXiv 2204.14198)."""

    config: ResamplerConnectorConfig

    def __init__(self, config: ResamplerConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, positions=config.positions)
        self.entry = nn.Linear(width_in, config.width)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, queries, width]."""
        patches = self.entry(self.placed(features, grid))
        queries = self.asking(features)
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.norm(queries)


class CrossAttention(QueryConnector):
    """One cross-attention layer (Qwen-VL, arXiv 2308.12966; MiniCPM-V, arXiv 2408.01800).

    Keys carry fixed positions, sines and cosines of row and column; queries carry none, as in MiniCPM-V, so that their
    first ones don't stand for the top of the image alone. Left out: the linear map behind the layer, which the
    projector is.
    """

    config: CrossAttentionConnectorConfig

    def __init__(self, config: CrossAttentionConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, positions=False)
        self.entry = nn.Linear(width_in, config.width, bias=False)
        self.norm_patches = nn.LayerNorm(config.width)
        self.norm_queries = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, dropout=config.dropout, batch_first=True)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, queries, width]."""
        patches = self.norm_patches(self.entry(self.placed(features)))
        keys = patches + sincos(patches, grid or self.square, frame=self.square)
        queries = self.norm_queries(self.asking(features))
        return self.norm(self.attention(queries, keys, patches, need_weights=False)[0])

    @property
    def needs_grid(self) -> bool:
        return True
