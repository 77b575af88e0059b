"""Another connector for a VPG that moves: more queries, fewer tokens, another kind. It takes over what fits."""

from dataclasses import asdict, dataclass, field

import torch

from vpgtrans.config import ConnectorConfig
from vpgtrans.vision import connectors
from vpgtrans.vision.connectors import Connector
from vpgtrans.vision.vpg import VPG

QUERIES = "queries"
"""The tensor [1, T, d] of which there may be more or fewer: its rows stand for themselves."""
NOISE = 0.1
"""Deviation of what is added to a query that copies another one, in units of the queries' RMS."""

_NAMED = 4
"""Tensors of a kind that a log names."""


@dataclass(frozen=True)
class TakenOver:
    """Names of a connector's tensors, by where they come from; queries with their number."""

    kept: list[str] = field(default_factory=list)
    enlarged: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, list[str]]:
        return asdict(self)

    @property
    def line(self) -> str:
        """For a log: of many names the first ones, which are the connector's own before those of its layers."""
        said = [f"{what} {_first(names)}" for what, names in asdict(self).items() if names]
        return "; ".join(said) or "it has no tensors"


def _first(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def completed(config: ConnectorConfig, source: ConnectorConfig) -> ConnectorConfig:
    """What is stated of a connector, and for the rest the source's own if it is of that kind."""
    if config.kind != source.kind:
        return config
    stated = {key: getattr(config, key) for key in config.model_fields_set}
    return source.model_copy(update=stated)


def exchange(vpg: VPG, config: ConnectorConfig, *, seed: int) -> tuple[VPG, TakenOver]:
    """A VPG's encoder with a connector of another config, whose tensors are the old one's as far as they fit.

    A tensor of the same name and shape is kept. Of queries the common first ones are kept, and more of them copy the
    first ones again, with noise: a query whose prompts the LLM reads already is a better start than a random one, and
    equal ones would stay equal. What else differs in shape is new, as random as in a connector from scratch.

    Raises:
        RecipeError: the config doesn't fit the encoder.
    """
    old = vpg.connector
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = connectors.build(completed(config, old.config), width_in=old.width_in, patches=old.patches)
        taken = _take_over(connector, old)
    return VPG(vpg.encoder, connector).eval(), taken


@torch.no_grad()
def _take_over(connector: Connector, old: Connector) -> TakenOver:
    before, taken = old.state_dict(), TakenOver()
    for name, tensor in connector.state_dict().items():
        was = before.get(name)
        if was is not None and was.shape == tensor.shape:
            tensor.copy_(was)
            taken.kept.append(name)
        elif was is not None and name == QUERIES and was.shape[2] == tensor.shape[2]:
            count, more = was.shape[1], tensor.shape[1] - was.shape[1]
            tensor[:, :count] = was[:, : tensor.shape[1]]
            if more > 0:
                copies = was[:, torch.arange(more) % count]
                tensor[:, count:] = copies + NOISE * was.square().mean().sqrt() * torch.randn_like(copies)
                taken.enlarged.append(f"{name}: {count} -> {count + more}")
            else:
                taken.kept.append(f"{name}: the first {count + more} of {count}")
        else:
            taken.new.append(name)
    return taken
