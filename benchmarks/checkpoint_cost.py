"""What a checkpoint every 100 updates costs, as a share of training, on the quickstart's fine-tune.

    python benchmarks/checkpoint_cost.py                # about 3 minutes on two idle cores
    python benchmarks/checkpoint_cost.py --updates 8    # to try it

The fine-tune of recipes/quickstart.yaml (Gemma 3 270M; connector, projector and LoRA train, packed) runs for some
updates and saves after every fourth. An update's time is the median over those that no save stands before, a save's is
the median over saves: all of it, from taking the state off the modules to the last fsync. The share is save ÷ (100
updates + save). Run it on an idle machine, and on the disk that runs lie on (--directory). Writes
benchmarks/results/checkpoint_cost.json.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from vpgtrans import runs
from vpgtrans.recipe import load_recipe
from vpgtrans.training.fit import StageRun
from vpgtrans.training.module import StageModule

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"
EVERY = 4
"""Updates between two saves here."""
UPDATES = 100
"""Updates between two saves of a run, as is the default."""


class Times:
    """When updates ended and how long saves took."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.saves: dict[int, float] = {}
        """Number of the update before a save -> its seconds."""
        self.bytes = 0

    def step(self, module: StageModule, *arguments: Any) -> None:
        self._step(module, *arguments)
        self.ends.append(time.perf_counter())

    def save(self, run: StageRun) -> None:
        began = time.perf_counter()
        self._save(run)
        took = time.perf_counter() - began
        assert run.checkpoints is not None
        newest = run.checkpoints.newest
        assert newest is not None
        self.bytes = sum(file.stat().st_size for file in newest.iterdir())
        self.saves.setdefault(run.progress.update, took)

    _step, _save = staticmethod(StageModule.training_step), staticmethod(StageRun.save)

    @property
    def updates(self) -> list[float]:
        """Seconds of each update that follows another one directly, its data included; the first are warm-up."""
        spans = enumerate(pairwise(self.ends), start=1)
        return [after - before for number, (before, after) in spans if number not in self.saves and number > 1]


def measure(updates: int, directory: Path | None) -> Times:
    size = {"stages.finetune.budget.samples": 16 * updates, "stages.finetune.validate_every": 16 * updates}
    few = {"trainer.validate_samples": 4, "evaluation.samples": 1, "evaluation.max_new_tokens": 1}
    recipe = load_recipe(QUICKSTART, {**size, **few, "trainer.checkpoint_every": EVERY})
    recipe = recipe.model_copy(update={"stages": recipe.stages[1:]})
    times = Times()
    with (
        tempfile.TemporaryDirectory(dir=directory) as made,
        patch.object(StageModule, "training_step", lambda module, *arguments: times.step(module, *arguments)),
        patch.object(StageRun, "save", lambda run: times.save(run)),
    ):
        runs.transfer(recipe, output=Path(made) / "run", device="cpu")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=24)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written, if not the temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    times = measure(arguments.updates, arguments.directory)
    update, save = median(times.updates), median(times.saves.values())
    found = {
        "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
        "updates": len(times.updates),
        "saves": len(times.saves),
        "update_seconds": round(update, 4),
        "save_seconds": round(save, 4),
        "slowest_save_seconds": round(max(times.saves.values()), 4),
        "checkpoint_bytes": times.bytes,
        "share": round(save / (UPDATES * update + save), 5),
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(found, indent=2) + "\n")
    print(
        f"an update {update:.2f} s, a checkpoint {save:.3f} s ({times.bytes / 1e6:.0f} MB): every {UPDATES} updates it "
        f"costs {found['share']:.2%} of training"
    )


if __name__ == "__main__":
    main()
