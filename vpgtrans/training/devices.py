"""How many devices a run trains on, and what has to be right for that."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from vpgtrans.errors import RecipeError
from vpgtrans.isolation import missing_here
from vpgtrans.processes import by_srun, first_process, launched, launcher
from vpgtrans.recipe import Recipe
from vpgtrans.training.config import TrainerConfig
from vpgtrans.training.workers import default_workers


def check_devices(recipe: Recipe, device: torch.device) -> None:
    """Whether the machine has the devices that a recipe asks for, and can share the work as it says.

    Args:
        device: of --device.

    Raises:
        RecipeError: it has fewer GPUs, lacks what the strategy needs, a launcher started another number of processes,
            or a batch has too few samples.
    """
    check_sharing(recipe)
    for problem in lacks(recipe, device):
        raise RecipeError(problem)
    asked, started = recipe.trainer.devices, launched()
    if started is not None and asked not in ("auto", started[0]):
        raise RecipeError(
            f"trainer.devices is {asked}, but {launcher()} started {started[0]} processes on this machine; give the "
            "same number to both, or trainer.devices=auto"
        )
    if by_srun() and started != (1, 1) and "SLURM_NTASKS_PER_NODE" not in os.environ:
        # Lightning would say so, too, but only when training begins.
        raise RecipeError(
            f"srun started {os.environ['SLURM_NTASKS']} tasks; say how many a machine has: --ntasks-per-node"
        )
    if device.type == "cuda" and started is None:
        there = torch.cuda.device_count()
        # A process that was started to train along has its own GPU's number here.
        if device.index is not None and first_process() and (there if asked == "auto" else asked) > 1:
            raise RecipeError(f"--device {device} is one GPU; give trainer.devices=1 with it, or --device cuda")
    for stage in recipe.stages:
        check_batch(stage.name, stage.batch_size, world_size(recipe, device))


def check_sharing(recipe: Recipe) -> None:
    """Raises RecipeError where a strategy can't go with the rest of a recipe, on whatever machine."""
    strategy = recipe.trainer.strategy
    if strategy in ("auto", "ddp"):
        return
    if recipe.target.quantise is not None:
        raise RecipeError(
            f"trainer.strategy: {strategy} can't cut weights that target.quantise keeps in few bits; right would be "
            "ddp, or target.quantise: null"
        )
    if strategy != "fsdp" and recipe.trainer.precision == "bf16-mixed":
        raise RecipeError(
            f"trainer.strategy: {strategy} would cast what trains to bf16 under trainer.precision: bf16-mixed; right "
            "would be bf16-true (what trains is float32 all the same), or another strategy"
        )
    if recipe.trainer.optimizer != "adamw":
        raise RecipeError(
            f"trainer.strategy: {strategy} needs trainer.optimizer: adamw, whose state can be cut; it is "
            f"{recipe.trainer.optimizer}; right would be one of both, or strategy: ddp"
        )


def lacks(recipe: Recipe, device: torch.device) -> Iterator[str]:
    """What this machine lacks of what a recipe asks for: GPUs, or what its strategy needs.

    A recipe may be right for another machine, so `validate` warns of it.
    """
    strategy, asked, started = recipe.trainer.strategy, recipe.trainer.devices, launched()
    if problem := missing_here(recipe.trainer.attention):
        yield f"trainer.attention: {recipe.trainer.attention} {problem}; right here would be auto"
    if strategy in ("deepspeed-2", "deepspeed-3"):
        if device.type != "cuda":
            yield f"trainer.strategy: {strategy} needs a GPU, and there is none; right here would be auto or fsdp"
        elif importlib.util.find_spec("deepspeed") is None:
            yield f"trainer.strategy: {strategy} needs the package deepspeed: pip install 'vpgtrans[deepspeed]'"
    if strategy != "auto" and device.type == "mps":
        yield f"trainer.strategy: {strategy} is for CPUs and NVIDIA or AMD GPUs; right here would be auto"
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if started is None and asked != "auto" and asked > there:
            yield f"trainer.devices is {asked}, but this machine has {there} GPU(s)"
        if started is not None and started[0] > there:
            hint = " (with --gpus-per-node, not --gpus-per-task)" if by_srun() else ""
            yield f"{launcher()} started {started[0]} processes here, and each sees {there} GPU(s); give one each{hint}"


def world_size(recipe: Recipe, device: torch.device) -> int:
    """How many devices a run trains on together."""
    asked, started = recipe.trainer.devices, launched()
    if started is not None:
        return started[0] * started[1]
    if asked != "auto":
        return asked
    return torch.cuda.device_count() if device.type == "cuda" else 1


def check_batch(stage: str, batch_size: int, world: int) -> None:
    """Raises RecipeError where a batch has fewer samples than devices train together."""
    if world > batch_size:
        raise RecipeError(
            f"stage {stage}: batch_size {batch_size} is for all devices together, and there are {world}; give at "
            "least one sample a device"
        )


def data_workers(recipe: Recipe, device: torch.device) -> int:
    """Processes that load data for one device, see `data.workers`."""
    if recipe.data.workers != "auto":
        return recipe.data.workers
    started = launched()
    here = started[0] if started is not None else torch.cuda.device_count() if device.type == "cuda" else 1
    return default_workers(device, processes=max(1, here))


def trainer_devices(config: TrainerConfig, device: torch.device) -> dict[str, Any]:
    """`L.Trainer`'s arguments for a VLM that lies on `device`."""
    started = launched()
    devices: Any = config.devices
    if started is not None:
        devices = started[0]
    elif devices == "auto" and device.type != "cuda":
        devices = 1  # more processes would compete for the same cores
    elif devices == 1 and device.type == "cuda":
        devices = [device.index or 0]  # 1 would mean the first GPU
    return {
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": devices,
        # What it would do on a signal, `stopping` does: a checkpoint of ours, and the job's script asks to go on.
        "plugins": [SLURMEnvironment(auto_requeue=False)] if by_srun() else None,
        "num_nodes": started[1] if started is not None else 1,
        "precision": "bf16-mixed" if config.precision == "bf16-mixed" else "32-true",
    }
