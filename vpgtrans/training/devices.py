"""How many devices a run trains on, and what has to be right for that."""

from typing import Any

import torch

from vpgtrans.errors import RecipeError
from vpgtrans.processes import by_torchrun, first_process
from vpgtrans.recipe import Recipe
from vpgtrans.training.config import TrainerConfig
from vpgtrans.training.workers import default_workers


def check_devices(recipe: Recipe, device: torch.device) -> None:
    """Whether the machine has the devices that a recipe asks for, and every batch a sample for each.

    Args:
        device: of --device.

    Raises:
        RecipeError: it has fewer GPUs, torchrun started another number of processes, or a batch is too small.
    """
    asked, started = recipe.trainer.devices, by_torchrun()
    if started is not None and asked not in ("auto", started[0]):
        raise RecipeError(
            f"trainer.devices is {asked}, but torchrun started {started[0]} processes on this machine; give the same "
            "number to both, or trainer.devices=auto"
        )
    if device.type == "cuda" and started is None:
        there = torch.cuda.device_count()
        if asked != "auto" and asked > there:
            raise RecipeError(f"trainer.devices is {asked}, but this machine has {there} GPU(s)")
        # A process that was started to train along has its own GPU's number here.
        if device.index is not None and first_process() and (there if asked == "auto" else asked) > 1:
            raise RecipeError(f"--device {device} is one GPU; give trainer.devices=1 with it, or --device cuda")
    for stage in recipe.stages:
        check_batch(stage.name, stage.batch_size, world_size(recipe, device))


def world_size(recipe: Recipe, device: torch.device) -> int:
    """How many devices a run trains on together."""
    asked, started = recipe.trainer.devices, by_torchrun()
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
    started = by_torchrun()
    here = started[0] if started is not None else torch.cuda.device_count() if device.type == "cuda" else 1
    return default_workers(device, processes=max(1, here))


def trainer_devices(config: TrainerConfig, device: torch.device) -> dict[str, Any]:
    """`L.Trainer`'s arguments for a VLM that lies on `device`."""
    started = by_torchrun()
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
        "num_nodes": started[1] if started is not None else 1,
        "precision": "bf16-mixed" if config.precision == "bf16-mixed" else "32-true",
    }
