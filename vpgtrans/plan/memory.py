"""Memory of a stage by part, under each strategy: what a pass leaves at its highest moment, beside what stays."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vpgtrans.config import Quantisation
from vpgtrans.llm import blocks_name
from vpgtrans.plan.skeleton import Skeleton
from vpgtrans.plan.trace import Passes
from vpgtrans.training.config import TrainerConfig

Strategy = Literal["single", "ddp", "fsdp", "deepspeed-2", "deepspeed-3"]
STRATEGIES: tuple[Strategy, ...] = ("single", "ddp", "fsdp", "deepspeed-2", "deepspeed-3")

BUCKET = 200 * 2**20
"""Bytes that DeepSpeed gathers before it exchanges them, twice: one bucket is filled while another one travels."""
_PACKED: dict[Quantisation, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a weight: of nf4 with a scale for 64, in a byte, and a float32 scale for 256 of these."""
SMALL, BLOCK = 4096, 256
"""bitsandbytes keeps moments of tensors below `SMALL` elements in float32; of others a float32 scale a `BLOCK`."""


@dataclass(frozen=True)
class Standing:
    """What is in memory all the time: bytes without any sharding.

    Attributes:
        weights: of all parts. gradients: of what trains. optimizer: its moments. largest: bytes of the largest
        tensor that trains. block: of the largest block of the LLM. unpacked: of the largest quantised weight as it is
        multiplied. words: of the tokenizer, a number.
    """

    weights: int
    gradients: int
    optimizer: int
    largest: int
    block: int
    unpacked: int = 0
    words: int = 0

    @classmethod
    def of(cls, vlm: Skeleton, trainer: TrainerConfig, *, quantise: Quantisation | None = None) -> "Standing":
        trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
        packed = [weight for block in _blocks(vlm) for module in block.modules() for weight in _quantisable(module)]
        saved = sum(int(weight.nbytes - weight.numel() * _PACKED[quantise]) for weight in packed) if quantise else 0
        moments = sum(moments_of(parameter.numel(), trainer.optimizer) for parameter in trained)
        return cls(
            weights=_bytes([*vlm.parameters(), *vlm.buffers()]) - saved,
            gradients=_bytes(trained),
            optimizer=moments,
            largest=max((parameter.nbytes for parameter in trained), default=0),
            block=max((_bytes([*block.parameters()]) for block in _blocks(vlm)), default=0),
            unpacked=max((weight.nbytes for weight in packed), default=0) if quantise else 0,
            words=vlm.llm.fingerprint.vocabulary,
        )


def _quantisable(module: nn.Module) -> list[Tensor]:
    """The weight of a module of a block, if it is one that is quantised; adapters train and stay."""
    return [module.weight] if isinstance(module, nn.Linear) and not module.weight.requires_grad else []


def moments_of(count: int, optimizer: str) -> int:
    """Bytes of both moments of a tensor of so many elements."""
    if not optimizer.endswith("8bit") or count < SMALL:
        return 8 * count
    return 2 * (count + 4 * -(-count // BLOCK))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors, tied ones once."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _blocks(vlm: Skeleton) -> list[nn.Module]:
    """The LLM's decoder blocks."""
    blocks = vlm.language_model.get_submodule(blocks_name(vlm.language_model))
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the highest moment of a stage, by part."""

    parts: dict[str, int]
    moment: str
    """Which one it is: step, update, validation or images."""

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Machine:
    """What a device takes for itself.

    Attributes:
        framework: bytes, whatever trains; with several devices `exchange` more. word: bytes of a tokenizer's word.
        slack: what the allocator holds beside activations and logits, as a share of them. together: whether an
        optimizer's update goes through all tensors at once.
    """

    framework: int
    exchange: int
    word: int
    slack: float
    together: bool


CPU = Machine(framework=40 * 2**20, exchange=50 * 2**20, word=1000, slack=0.45, together=False)
"""Measured by `benchmarks/plan.py`: libraries' own buffers; tokenizers, 17 MB of 49,152 words and 278 MB of 262,144;
and glibc, which raises the size from which freed memory goes back to the system to 32 MB, so that about half as much as
is alive lies between. With MALLOC_TRIM_THRESHOLD_ set to any value it doesn't, and there is no slack."""
GPU = Machine(framework=700 * 2**20, exchange=500 * 2**20, word=0, slack=0.08, together=True)
"""CUDA's context and cuBLAS's workspaces; NCCL's buffers. Not measured here: no GPU was at hand."""


def memory(
    standing: Standing,
    *,
    step: Passes,
    validation: Passes,
    images: Passes,
    strategy: Strategy,
    devices: int,
    machine: Machine,
) -> Memory:
    """Of one device at the highest moment of a stage.

    Args:
        step, validation, images: passes of an update's micro-batches, of a validation's batch, of the frozen front.
    """
    share = 1 if strategy == "single" else devices
    whole = strategy in ("single", "ddp")
    sharded = strategy in ("fsdp", "deepspeed-3")
    weights = standing.weights // share if sharded else standing.weights
    moments = standing.optimizer if whole else standing.optimizer // share
    standing_by = {"weights": weights, "optimizer": moments}
    buffers = standing.unpacked
    if sharded:
        buffers += 2 * standing.block  # the block at work, and the next one on its way
    if strategy.startswith("deepspeed"):
        buffers += 2 * min(BUCKET, standing.gradients)
    framework = machine.framework + machine.word * standing.words
    fixed = {"framework": framework + (machine.exchange if share > 1 else 0), "buffers": buffers}

    def moment(passes: Passes) -> dict[str, int]:
        gradients = passes.gradients if whole or strategy == "deepspeed-2" else passes.gradients // share
        return {
            **standing_by,
            "gradients": gradients,
            "activations": passes.activations,
            "logits": passes.logits,
            **fixed,
            "allocator": int(machine.slack * (passes.activations + passes.logits)),
        }

    gathered = standing.gradients if whole else standing.gradients // share
    temporary = (standing.gradients if whole else standing.gradients // share) if machine.together else 0
    temporary = temporary or 2 * standing.largest // (1 if whole else share)
    update = {**standing_by, "gradients": gathered, "optimizer": moments + temporary, **fixed}
    at = {
        "step": moment(step),
        "update": {"weights": 0, "gradients": 0, "activations": 0, "logits": 0} | update,
        "validation": moment(validation),
        "images": moment(images),
    }
    name = max(at, key=lambda key: sum(at[key].values()))
    return Memory(at[name], name)
