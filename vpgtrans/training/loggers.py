"""Who is told what the log holds besides its files: TensorBoard, Weights & Biases, trackio (`trainer.loggers`).

Each line's numbers become scalars `STAGE/NAME` at the samples seen so far, which count on over stages. A resumed run
repeats lines that were told already; `RunLog` leaves those out.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.version import Version

from vpgtrans.errors import RecipeError
from vpgtrans.recipe import Recipe
from vpgtrans.training.log import Told

NEEDS: dict[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "2.15"),
    "wandb": ("wandb", "0.18"),
    "trackio": ("trackio", "0.5"),
}
"""Logger -> its distribution, and the first version that will do."""
PROJECT = "vpgtrans"


def check_loggers(names: Sequence[str]) -> None:
    """Whether the packages that loggers need are here; nothing is imported.

    Raises:
        RecipeError: one is missing or too old.
    """
    for name in names:
        package, least = NEEDS[name]
        try:
            here = version(package) if find_spec(package) else None
        except PackageNotFoundError:
            here = None
        if here is None or Version(here) < Version(least):
            found = "is not installed" if here is None else f"is here in version {here}, and {least} is needed"
            raise RecipeError(f"trainer.loggers: {name}: {package} {found}: pip install 'vpgtrans[loggers]'")


def told_by(recipe: Recipe, run: Path) -> list[Told]:
    """The loggers of a run, open; what they write lies in its directory, or where they are told to by their own
    environment variables (`WANDB_MODE`, `WANDB_PROJECT`, `TRACKIO_DIR`, …)."""
    makers: dict[str, Callable[[Recipe, Path], Told]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "trackio": _Trackio,
    }
    return [makers[name](recipe, run) for name in recipe.trainer.loggers]


class _TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, recipe: Recipe, run: Path):
        from lightning.pytorch.loggers import TensorBoardLogger

        self._logger = TensorBoardLogger(save_dir=run, name="", version="tensorboard", max_queue=1)

    def log(self, figures: Mapping[str, float], *, stage: str, samples: int) -> None:
        self._logger.log_metrics(_named(figures, stage), step=samples)

    def close(self) -> None:
        self._logger.finalize("success")


class _Wandb:
    """A run of W&B, resumed under the id that goes with the directory; offline where WANDB_MODE says so."""

    def __init__(self, recipe: Recipe, run: Path):
        from lightning.pytorch.loggers import WandbLogger

        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        config = recipe.model_dump(mode="json")
        self._logger = WandbLogger(name=recipe.name, id=name, project=project, save_dir=run, config=config)

    def log(self, figures: Mapping[str, float], *, stage: str, samples: int) -> None:
        self._logger.log_metrics(_named(figures, stage), step=samples)

    def close(self) -> None:
        self._logger.experiment.finish()


class _Trackio:
    """A run of trackio, on this machine unless its own settings say otherwise. Lightning has no logger for it."""

    def __init__(self, recipe: Recipe, run: Path):
        import trackio

        name = f"{recipe.name}-{hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]}"
        # `embed` would open a page in a notebook.
        with redirect_stdout(sys.stderr):  # it greets, and stdout is for results
            self._run: Any = trackio.init(
                project=PROJECT, name=name, config=recipe.model_dump(mode="json"), resume="allow", embed=False
            )

    def log(self, figures: Mapping[str, float], *, stage: str, samples: int) -> None:
        self._run.log(_named(figures, stage), step=samples)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


_PLACES = ("stage", "update", "samples", "text_tokens", "seconds")
"""Where a line stands: a validation stands where the update before it does."""


def _named(figures: Mapping[str, float], stage: str) -> dict[str, float]:
    return {f"{stage}/{name}": value for name, value in figures.items() if name not in _PLACES}
