"""Resumable state of a run: what trained so far, the optimizer, and how far the run is.

A checkpoint is a directory that appears at once: its files written beside its place and fsynced, then a manifest of
their hashes, then the name. One good one is needed to go on; the last two are kept, and none is removed before a newer
one is whole. What is damaged is passed over.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpgtrans.errors import CheckpointError, MachineError
from vpgtrans.files import sync
from vpgtrans.references import file_sha256

_LOGGER = logging.getLogger(__name__)

FORMAT = 2
_PROGRESS, _STATE, _BEST, _OPTIMIZER = "progress.json", "state.safetensors", "best.safetensors", "optimizer.pt"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{2,})-(\d{8,})(?:\.(\d+))?")
"""Stage and update; a number behind them where an earlier process left a checkpoint of the same update."""


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
    patience: dict[str, float] = field(default_factory=dict)
    """Of early stopping in this stage: the loss to beat, and how many validations have not."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard knows, see `training.guard`."""
    picked: dict[str, Any] = field(default_factory=dict)
    """What the range test of this stage came to, see `training.rates`."""
    work: dict[str, Any] = field(default_factory=dict)
    """Seconds, samples, tokens and operations of this stage's updates, see `training.throughput`."""
    finished: list[dict[str, Any]] = field(default_factory=list)
    """Results of the stages that are done."""
    elapsed: float = 0.0
    """Seconds since the run was begun, everything included; not those between a stop and a resume."""
    validated: int = -1
    """The update of this stage that was validated last: a signal may come before a validation is through."""


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
    """The checkpoints of one run, in `directory`, to which no other process writes meanwhile."""

    def __init__(self, directory: Path, *, keep: int = 2, writes: bool = True, clock: Clock | None = None):
        """writes: whether `save` does anything; of several processes only the first one's does."""
        self.directory = directory
        self.clock = clock or Clock()
        self.keep = keep
        self.writes = writes

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint by its name; whether it is whole is not looked at."""
        return next(reversed(self._all()), None)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint so that it is there whole or not at all.

        Raises:
            MachineError: it can't be written: the disk is full, or the directory may not be written to. What was there
                before is there still.
        """
        if not self.writes:
            return
        progress = checkpoint.progress
        progress.elapsed = self.clock()
        place = f"{progress.stage:02d}-{progress.update:08d}"
        temporary = self.directory / f".{place}.{os.getpid()}.tmp"
        try:
            self._make_room()
            temporary.mkdir()
            self._write(checkpoint, temporary)
            # Never onto one that is there, which would have to go first. It may be damaged, or whole and passed by.
            others = [path for path in self._all() if path.name.partition(".")[0] == place]
            again = 1 + max((_order(path)[2] for path in others), default=-1)
            target = self.directory / (f"{place}.{again}" if again else place)
            os.rename(temporary, target)
            sync(self.directory)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap what the disk says
            raise MachineError(self._not_written(place, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # What sorts after this one is damaged, or the run would have gone on from it.
        earlier = [path for path in self._all() if _order(path) < _order(target) and path not in others]
        kept = {target, *earlier[max(0, len(earlier) - self.keep + 1) :]}
        for other in self._all():
            if other not in kept:
                self._remove(other)

    def load(self) -> Checkpoint | None:
        """The newest whole checkpoint, None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        problems = []
        for directory in reversed(self._all()):
            try:
                found = _read(directory)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, CheckpointError) as error:
                _LOGGER.warning("%s is passed over: %s", directory, error)
                problems.append(f"{directory}: {error}")
            else:
                self.clock.before = found.progress.elapsed
                return found
        if problems:
            raise CheckpointError(
                "no checkpoint is whole; right would be one from a backup, or the run anew with --overwrite:\n"
                + "\n".join(problems)
            )
        return None

    def _all(self) -> list[Path]:
        """Oldest first."""
        if not self.directory.is_dir():
            return []
        found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_order)

    def _make_room(self) -> None:
        """The directory, without what a process that was killed left half written or half removed."""
        if not self.directory.is_dir():
            self.directory.mkdir(parents=True)
            sync(self.directory.parent)
        for left in self.directory.glob(".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def _write(self, checkpoint: Checkpoint, directory: Path) -> None:
        progress = checkpoint.progress
        (directory / _PROGRESS).write_text(json.dumps(asdict(progress), indent=2))
        save_file(checkpoint.state, directory / _STATE)
        save_file(checkpoint.best_state, directory / _BEST)
        if checkpoint.optimizer is not None:
            torch.save(checkpoint.optimizer, directory / _OPTIMIZER)
        files = {}
        for file in sorted(directory.iterdir()):
            sync(file)
            files[file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
        # Last of all, so that where it stands all that it names stood before it.
        (directory / _MANIFEST).write_text(_manifest(progress.stage, progress.update, files))
        sync(directory / _MANIFEST)
        sync(directory)

    def _remove(self, directory: Path) -> None:
        """Under another name first: what is half removed is no damaged checkpoint."""
        going = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
        try:
            os.rename(directory, going)
        except OSError as error:
            _LOGGER.warning("%s can't be removed: %s", directory, error)
        shutil.rmtree(going, ignore_errors=True)

    def _not_written(self, place: str, error: Exception) -> str:
        left = self.newest
        kept = f"the run goes on from {left} with --resume" if left else "there is none before it"
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, RuntimeError):
            reason = "a file could not be written whole"  # torch.save does not say why
        else:
            reason = str(error).strip()
        return (
            f"checkpoint {place} can't be written to {self.directory}: {reason}; {kept}. Right would be more room "
            "there (see `df`, quotas and limits), or a directory that may be written to"
        )


def _order(directory: Path) -> tuple[int, int, int]:
    match = _NAME.fullmatch(directory.name)
    assert match is not None
    return int(match[1]), int(match[2]), int(match[3] or 0)


def _manifest(stage: int, update: int, files: dict[str, Any]) -> str:
    """A manifest's only spelling: whatever byte is altered, it no longer is what this gives."""
    said = {"format": FORMAT, "stage": stage, "update": update, "files": files}
    own = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return json.dumps({**said, "sha256": own}, indent=2)


def _read(directory: Path) -> Checkpoint:
    """
    Raises:
        CheckpointError: it is not whole, or not what its name says. OSError: it can't be read.
    """
    text = (directory / _MANIFEST).read_bytes()
    try:
        said = json.loads(text)
        files, written = said["files"], said["format"]
        whole = text == _manifest(said["stage"], said["update"], files).encode()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{_MANIFEST} is damaged, or of another version ({error})") from error
    if written != FORMAT:
        raise CheckpointError(f"{_MANIFEST} is damaged, or of another version (format {written}; this one: {FORMAT})")
    if not whole:
        raise CheckpointError(f"{_MANIFEST} is damaged: it was altered")
    if _order(directory)[:2] != (said["stage"], said["update"]):
        raise CheckpointError(
            f"it is the checkpoint of stage {said['stage']}, update {said['update']}, by its manifest"
        )
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{name} is missing")
        if file.stat().st_size != expected["size"] or file_sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{name} is damaged: its size or sha256 is not the manifest's")
    return Checkpoint(
        progress=Progress(**json.loads((directory / _PROGRESS).read_text())),
        state=load_file(directory / _STATE),
        best_state=load_file(directory / _BEST),
        optimizer=torch.load(directory / _OPTIMIZER, weights_only=True) if _OPTIMIZER in files else None,
    )
