"""Seconds of an update: a roofline of products, memory and links. Nothing here was timed on a GPU."""

from dataclasses import dataclass

from vpgtrans.gpus import Gpu
from vpgtrans.plan.memory import Standing, Strategy

UTILISATION = 0.4
"""Of the peak, what products reach in training; one number for all models and types. Careful code reaches .3 to .5."""
BETWEEN_NODES = 25e9
"""Bytes a second and GPU from machine to machine: 200 Gbit/s each."""
OPTIMIZER_PASSES = 2
"""How often an optimizer's update moves weights, gradients and moments: read and written."""


@dataclass(frozen=True)
class Load:
    """What an update asks of one device.

    Attributes:
        flops: products. passes: micro-batches, each of which reads the weights forward and backward.
    """

    flops: float
    passes: int


def seconds(
    load: Load,
    standing: Standing,
    *,
    gpu: Gpu,
    peak: float,
    strategy: Strategy,
    devices: int,
    nodes: int = 1,
) -> float:
    """Of one update on one of so many devices.

    Products overlap neither with the exchange of gradients, which comes after the last one, nor with the optimizer;
    weights that are gathered from other devices travel while the block before them is at work.
    """
    readings = 2 * load.passes
    work = max(load.flops / (peak * UTILISATION), readings * standing.weights / gpu.bandwidth)
    share = 1 if strategy == "single" else devices
    link = gpu.link if nodes == 1 else min(gpu.link, BETWEEN_NODES)
    others = (share - 1) / share
    sharded = strategy in ("fsdp", "deepspeed-3")
    if sharded:
        work = max(work, readings * standing.weights * others / link)
    # an all-reduce is a reduce-scatter and an all-gather; shards need the first alone, ZeRO-2 gathers weights instead
    exchange = (1 if sharded else 2) * standing.gradients * others / link
    own = share if strategy not in ("single", "ddp") else 1
    moved = OPTIMIZER_PASSES * (2 * standing.gradients + standing.optimizer) / own
    return work + exchange + moved / gpu.bandwidth
