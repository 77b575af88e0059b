"""The visual prompt generator: encoder + connector. It belongs to no LLM.

pixels [B, 3, S, S] -> encode -> patches [B, N, d_enc] -> connect -> visual tokens [B, T, d_vpg]
"""

from torch import Tensor, nn

from vpgtrans.config import VPGConfig
from vpgtrans.errors import TransferError
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.connectors import Connector
from vpgtrans.vision.encoders import Encoder
from vpgtrans.vision.grid import Grid
from vpgtrans.vision.preprocess import ImageTransform


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
        self.transform = ImageTransform(encoder.config.image)

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
        """T, visual tokens an image."""
        return self.connector.tokens

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> patches [B, N, d_enc]."""
        return self.encoder(pixels)

    def connect(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """Patches [B, N, d_enc] -> visual tokens [B, T, d_vpg]; `grid` as in `Connector.forward`."""
        return self.connector(features, grid)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] -> visual tokens [B, T, d_vpg]."""
        return self.connect(self.encode(pixels))


def build_vpg(config: VPGConfig, *, load_weights: bool = True) -> VPG:
    """Build a VPG: the encoder with its reference's weights (unless told not to), the connector random.

    Random weights come from torch's global generator: seed it, or use `torch.random.fork_rng`.
    """
    encoder = encoders.build(config.encoder, load_weights=load_weights)
    connector = connectors.build(config.connector, width_in=encoder.width, patches=encoder.patches)
    return VPG(encoder, connector)
