"""Resumable state of a run: what trained so far, the optimizer, and how far the run is.

A checkpoint is a directory that appears at once: written beside its place, fsynced, renamed, hashes in a manifest.
Only one good one is needed to go on, and the last two are kept.
"""

import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpgtrans.errors import CheckpointError
from vpgtrans.files import sync
from vpgtrans.references import file_sha256

_LOGGER = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is. Counts are over the whole run where not said otherwise."""

    stage: int = 0
    update: int = 0
    """Updates done in this stage."""
    samples: int = 0
    text_tokens: int = 0
    seconds: float = 0.0
    stage_start: dict[str, float] = field(default_factory=lambda: {"samples": 0, "text_tokens": 0, "seconds": 0.0})
    best: dict[str, Any] = field(default_factory=dict)
    """val_loss, samples and update of the best validation in this stage."""
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Results of the stages that are done."""
    elapsed: float = 0.0
    """Seconds since the run was begun, everything included; not those between a stop and a resume."""


class Clock:
    """Seconds that a run has taken, those before it was resumed (up to the checkpoint it goes on from) included."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self.before = 0.0

    def __call__(self) -> float:
        return self.before + time.perf_counter() - self._begun


@dataclass
class Checkpoint:
    """What a checkpoint holds."""

    progress: Progress
    state: dict[str, Tensor]
    """Tensors of the parts that changed since the run began."""
    best_state: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    """None between stages."""


class Checkpoints:
    """The checkpoints of one run, in `directory`."""

    def __init__(self, directory: Path, *, keep: int = 2, writes: bool = True, clock: Clock | None = None):
        """writes: whether `save` does anything; of several processes only the first one's does."""
        self.directory = directory
        self.clock = clock or Clock()
        self.keep = keep
        self.writes = writes

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint so that it is there whole or not at all."""
        if not self.writes:
            return
        progress = checkpoint.progress
        progress.elapsed = self.clock()
        target = self.directory / f"{progress.stage:02d}-{progress.update:08d}"
        for left in self.directory.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while it wrote
        temporary = self.directory / f".{target.name}.{os.getpid()}.tmp"
        temporary.mkdir(parents=True)
        (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2))
        save_file(checkpoint.state, temporary / "state.safetensors")
        save_file(checkpoint.best_state, temporary / "best.safetensors")
        if checkpoint.optimizer is not None:
            torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
        hashes = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(hashes, indent=2))
        for file in temporary.iterdir():
            sync(file)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync(self.directory)
        # What sorts after this one is damaged, or the run would have gone on from it.
        kept = [path for path in self._all() if path.name <= target.name][-self.keep :]
        for other in self._all():
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint, None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        problems = []
        for directory in reversed(self._all()):
            try:
                found = self._read(directory)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError, CheckpointError) as error:
                _LOGGER.warning("%s is passed over: %s", directory, error)
                problems.append(f"{directory}: {error}")
            else:
                self.clock.before = found.progress.elapsed
                return found
        if problems:
            raise CheckpointError("no checkpoint is whole:\n" + "\n".join(problems))
        return None

    def _all(self) -> list[Path]:
        """Oldest first: names sort by stage and update."""
        return sorted(path for path in self.directory.glob("[0-9]*-[0-9]*") if path.is_dir())

    def _read(self, directory: Path) -> Checkpoint:
        hashes = json.loads((directory / "manifest.json").read_text())
        if not isinstance(hashes, dict) or not hashes:
            raise CheckpointError("manifest.json lists no files")
        for name, expected in hashes.items():
            if file_sha256(directory / name) != expected:
                raise CheckpointError(f"{name} is damaged: its sha256 is not the manifest's")
        optimizer = directory / "optimizer.pt"
        return Checkpoint(
            progress=Progress(**json.loads((directory / "progress.json").read_text())),
            state=load_file(directory / "state.safetensors"),
            best_state=load_file(directory / "best.safetensors"),
            optimizer=torch.load(optimizer, weights_only=True) if optimizer.exists() else None,
        )
