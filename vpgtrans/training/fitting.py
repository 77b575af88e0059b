"""What fits training into memory and time: whether this machine can do it, and blocks checkpointed or compiled.

Both are put around the blocks' `forward` for as long as a stage trains, and are gone afterwards: names of tensors, and
what is saved, know nothing of them. It does not matter whether a block is in training mode: a frozen LLM, which stays
in eval mode, is where checkpointing saves most, and transformers' own acts in training mode alone.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vpgtrans.doctor import cpu_has_bf16
from vpgtrans.errors import RecipeError
from vpgtrans.isolation import attention_as_now
from vpgtrans.llm import blocks_name
from vpgtrans.quantise import SUPPORTED, check_bitsandbytes
from vpgtrans.recipe import Recipe
from vpgtrans.training.config import Stage, TrainerConfig
from vpgtrans.vision.encoders import encoder_blocks
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
Forward = Callable[..., Any]

COMPILER = "inductor"
"""Back end of `torch.compile`."""
_WHOLE = ("auto", "ddp")
"""Strategies in which every device has whole parameters."""


# --- checks -----------------------------------------------------------------------------------------


def check_fitting(recipe: Recipe, device: torch.device) -> None:
    """Whether this machine can do what a recipe says of precision, optimizer and quantised weights.

    Raises:
        RecipeError: a package or the hardware lacks it, or parts of the recipe don't go together.
    """
    trainer, quantise = recipe.trainer, recipe.target.quantise
    _check_precision(trainer, device)
    if quantise is not None:
        check_bitsandbytes(f"target.quantise: {quantise}")
        if device.type not in SUPPORTED:
            raise RecipeError(f"target.quantise: {quantise} runs on {' and '.join(SUPPORTED)}, not on {device.type}")
        _check_whole(trainer, f"target.quantise: {quantise}", "null")
    if trainer.optimizer != "adamw":
        check_bitsandbytes(f"trainer.optimizer: {trainer.optimizer}")
        if trainer.optimizer.startswith("paged") and device.type != "cuda":
            raise RecipeError(
                f"trainer.optimizer: {trainer.optimizer} moves memory between a GPU and the CPU, and this run is on "
                f"{device.type}; right would be {trainer.optimizer.removeprefix('paged-')}"
            )
        if device.type not in SUPPORTED:
            raise RecipeError(
                f"trainer.optimizer: {trainer.optimizer} runs on {' and '.join(SUPPORTED)}, not on {device.type}; "
                "right would be adamw"
            )
        _check_whole(trainer, f"trainer.optimizer: {trainer.optimizer}", "adamw")


def _check_whole(trainer: TrainerConfig, what: str, right: str) -> None:
    if trainer.strategy not in _WHOLE:
        raise RecipeError(
            f"{what} does not go with trainer.strategy: {trainer.strategy}, which splits what bitsandbytes takes "
            f"whole; right would be {right}, or trainer.strategy: ddp"
        )


def _check_precision(trainer: TrainerConfig, device: torch.device) -> None:
    if not trainer.precision.startswith("bf16"):
        return
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RecipeError(
            f"trainer.precision: {trainer.precision}: {torch.cuda.get_device_name(device)} has no bf16; right would be "
            "fp32 or auto"
        )
    if device.type == "cpu" and not cpu_has_bf16():
        _LOGGER.warning(
            "trainer.precision: %s: this processor has no bf16 and emulates it, slowly; auto takes fp32",
            trainer.precision,
        )


def check_blocks(trainer: TrainerConfig, vpg: VPG) -> None:
    """Raises RecipeError where an encoder is to be checkpointed that has no blocks."""
    asked = trainer.gradient_checkpointing
    if isinstance(asked, list) and "encoder" in asked and not encoder_blocks(vpg.encoder):
        raise RecipeError(
            f"trainer.gradient_checkpointing: encoder: {vpg.config.encoder.kind} is no transformer and has no blocks; "
            "right would be [llm]"
        )


# --- around the blocks -------------------------------------------------------------------------------


@contextmanager
def fitted(vlm: VLM, stage: Stage, trainer: TrainerConfig) -> Iterator[None]:
    """Within the block, blocks of the LLM and the encoder compute as the trainer's config says."""
    with ExitStack() as stack:
        model: Any = vlm.language_model
        llm = list(model.get_submodule(blocks_name(model)))
        if trainer.compile:
            for block in llm:
                stack.enter_context(_around(block, _compiled))
        if checkpoints(trainer, "llm"):
            for block in llm:
                stack.enter_context(_around(block, lambda forward: _checkpointed(forward, lambda: _same(model))))
        if checkpoints(trainer, "encoder") and stage.trainable["encoder"] != "frozen":
            for block in encoder_blocks(vlm.vpg.encoder):
                stack.enter_context(_around(block, lambda forward: _checkpointed(forward, _none)))
        yield


def checkpoints(trainer: TrainerConfig, part: str) -> bool:
    """Whether a part's blocks are to be computed anew on the way back."""
    asked = trainer.gradient_checkpointing
    return part in asked if isinstance(asked, list) else asked


@contextmanager
def _around(block: nn.Module, change: Callable[[Forward], Forward]) -> Iterator[None]:
    """Within the block of code the module's `forward` is another; hooks on it stay outside."""
    own = block.__dict__.get("forward")
    block.forward = change(block.forward)
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _compiled(forward: Forward) -> Forward:
    # Lengths differ from batch to batch: one graph for all of them.
    return torch.compile(forward, dynamic=True, backend=COMPILER)


def _checkpointed(forward: Forward, contexts: Contexts) -> Forward:
    @wraps(forward)
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)

    return run


def _none() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), nullcontext()


def _same(model: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """On the way back the LLM's attention is what it was on the way there: by then `isolation` has put it back."""
    return nullcontext(), attention_as_now(model)
