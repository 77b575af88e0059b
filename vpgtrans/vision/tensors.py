"""Reading chosen tensors out of a Hugging Face checkpoint directory, whole or sharded, and none of the others."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vpgtrans.errors import CheckpointError, ReferenceError_
from vpgtrans.parts import load_strict

T = TypeVar("T")


class CheckpointTensors:
    """The tensors of a directory with `model.safetensors`, or its shards and their index (`.bin` as a second choice).

    Attributes:
        shard_of: name -> file that holds it.

    Raises:
        ReferenceError_: there are no weights. CheckpointError: the index or a shard is damaged or missing.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.shard_of: dict[str, Path] = {}
        for stem in ("model.safetensors", "pytorch_model.bin"):
            whole, index = self.directory / stem, self.directory / f"{stem}.index.json"
            if whole.is_file():
                self.shard_of = dict.fromkeys(_names(whole), whole)
                return
            if index.is_file():
                self.shard_of = {name: self.directory / file for name, file in _weight_map(index).items()}
                return
        raise ReferenceError_(
            f"{self.directory}: no weights; looked for model.safetensors, pytorch_model.bin and their .index.json"
        )

    def under(self, prefixes: Iterable[str]) -> dict[str, Tensor]:
        """The tensors below the first of `prefixes` that the checkpoint has, by their names without it.

        Raises:
            CheckpointError: there is nothing below any of them.
        """
        prefixes = list(prefixes)
        for prefix in prefixes:
            chosen = {name: name[len(prefix) :] for name in self.shard_of if name.startswith(prefix)}
            if chosen:
                return {chosen[name]: tensor for name, tensor in self.read(chosen).items()}
        raise CheckpointError(f"{self.directory}: holds no tensor below any of {prefixes}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in their stored dtypes; each shard is opened once."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.shard_of:
                raise CheckpointError(f"{self.directory}: has no tensor {name}")
            wanted.setdefault(self.shard_of[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for shard, inside in wanted.items():
            tensors.update(_read(shard, inside))
        return tensors


def load_vision_model(
    model: nn.Module, tensors: CheckpointTensors, *, prefixes: Iterable[str], unused: tuple[str, ...] = ()
) -> None:
    """Load a `transformers` vision model from below one of `prefixes`, without the submodules named in `unused`.

    Checkpoints of transformers 4 have a level `vision_model.` inside CLIP's and SigLIP's towers, those of later
    versions need not, and neither need the classes of the installed version: the level is set to what `model` has.
    """
    level = "vision_model."
    state = tensors.under([prefix + inner for prefix in prefixes for inner in (level, "")])
    state = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in unused}
    expected = model.state_dict()
    if all(name.startswith(level) for name in expected):
        state = {level + name: tensor for name, tensor in state.items()}
    drop_obsolete(state, expected)
    load_strict(model, state, where=str(tensors.directory))


def drop_obsolete(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Forget `position_ids`: a constant that old versions of transformers saved and new ones recompute."""
    for name in [name for name in state if name.split(".")[-1] == "position_ids" and name not in expected]:
        del state[name]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights ({error!r})") from error


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickle(path))
    return _guarded(path, lambda: _safetensors(path, None)[0])


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    if path.suffix == ".bin":
        everything = _unpickle(path)
        missing = [name for name in names if name not in everything]
        if missing:
            raise CheckpointError(f"{path}: lacks {missing[0]}, which the index puts there")
        return {name: everything[name].clone() for name in names}
    return _guarded(path, lambda: _safetensors(path, names)[1])


def _safetensors(path: Path, names: list[str] | None) -> tuple[list[str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys()), {name: file.get_tensor(name) for name in names or []}


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Plain tensors only, memory-mapped, so that unread ones cost no memory."""
    state = _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a dict of tensors, holds a {type(state).__name__}")
    return state


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: not readable as weights ({error})") from error
