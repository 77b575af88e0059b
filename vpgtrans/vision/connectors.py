"""Connectors: patch features [B, N, d_enc] -> visual tokens [B, T, d_vpg]."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vpgtrans.config import (
    ConnectorConfig,
    IdentityConnectorConfig,
    QFormerConnectorConfig,
    ResamplerConnectorConfig,
)
from vpgtrans.errors import RecipeError

INITIAL_STD = 0.02
"""Of learned queries and positions, as in BERT and BLIP-2."""
SMALLEST_DEVIATION = 0.2
"""Of the channels' mean one: a channel that is silent in the images measured is not blown up where it speaks."""


class Connector(nn.Module, ABC):
    """Base class.

    Attributes:
        config; width_in: d_enc; width: d_vpg; patches: N, what `positions` was made for; tokens: T.
    """

    config: QFormerConnectorConfig | ResamplerConnectorConfig | IdentityConnectorConfig

    def __init__(self, config: ConnectorConfig, *, width_in: int, patches: int, width: int, tokens: int):
        super().__init__()
        self.config = config
        self.width_in, self.patches, self.width, self.tokens = width_in, patches, width, tokens

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, T, d_vpg]."""


class QueryConnector(Connector):
    """What connectors with learned queries share: the queries, and how patches come in: standardised, with positions.

    Attributes:
        mean, deviation: [d_enc] of the patches, see `measure`; None if the config doesn't ask for them.
    """

    config: QFormerConnectorConfig | ResamplerConnectorConfig
    mean: Tensor | None
    deviation: Tensor | None

    def __init__(self, config: QFormerConnectorConfig | ResamplerConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, width=config.width, tokens=config.queries)
        if config.width % config.heads:
            raise RecipeError(f"connector: width {config.width} must be a multiple of heads {config.heads}")
        self.queries = nn.Parameter(torch.randn(1, config.queries, config.width) * INITIAL_STD)
        self.positions = nn.Parameter(torch.randn(1, patches, width_in) * INITIAL_STD) if config.positions else None
        self.register_buffer("mean", torch.zeros(width_in) if config.standardised else None)
        self.register_buffer("deviation", torch.ones(width_in) if config.standardised else None)

    @torch.no_grad()
    def measure(self, features: Tensor) -> None:
        """Take mean and deviation of each channel from the features [B, N, d_enc] of some training images."""
        assert self.mean is not None, "made without `standardised`"
        assert self.deviation is not None
        deviation, mean = torch.std_mean(features.float().flatten(0, 1), dim=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=(SMALLEST_DEVIATION * deviation.mean()).clamp(min=1e-6)))

    def placed(self, features: Tensor) -> Tensor:
        """Features [B, N, d_enc] in the connector's dtype, standardised and with their positions added."""
        if self.mean is not None and self.deviation is not None:
            features = (features.float() - self.mean) / self.deviation  # in float32: means may be many deviations
        features = features.to(self.queries.dtype)
        return features if self.positions is None else features + self.positions


class QFormer(QueryConnector):
    """BLIP-2's Q-Former (arXiv 2301.12597), the vision half, as transformers implements it."""

    config: QFormerConnectorConfig

    def __init__(self, config: QFormerConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches)
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

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, queries, width]."""
        queries = self.queries.expand(len(features), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=self.placed(features)).last_hidden_state


class ResamplerLayer(nn.Module):
    """One layer of a perceiver resampler: queries attend to patches and queries, then a feed-forward layer."""

    def __init__(self, config: ResamplerConnectorConfig):
        super().__init__()
        self.norm_patches = nn.LayerNorm(config.width)
        self.norm_queries = nn.LayerNorm(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.heads, dropout=config.dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.width),
        )

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
        super().__init__(config, width_in=width_in, patches=patches)
        self.entry = nn.Linear(width_in, config.width)
        self.layers = nn.ModuleList(ResamplerLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, N, d_enc] -> visual tokens [B, queries, width]."""
        patches = self.entry(self.placed(features))
        queries = self.queries.expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, patches)
        return self.norm(queries)


class Identity(Connector):
    """Patch features as they are (LLaVA): T = N, d_vpg = d_enc."""

    config: IdentityConnectorConfig

    def __init__(self, config: IdentityConnectorConfig, *, width_in: int, patches: int):
        super().__init__(config, width_in=width_in, patches=patches, width=width_in, tokens=patches)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, N, d_enc], unchanged."""
        return features


def build(config: ConnectorConfig, *, width_in: int, patches: int) -> Connector:
    """A connector with random weights for an encoder of `width_in` channels and `patches` patches an image."""
    if isinstance(config, QFormerConnectorConfig):
        return QFormer(config, width_in=width_in, patches=patches)
    if isinstance(config, ResamplerConnectorConfig):
        return Resampler(config, width_in=width_in, patches=patches)
    return Identity(config, width_in=width_in, patches=patches)
