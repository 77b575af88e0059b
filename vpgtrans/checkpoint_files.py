"""The weight files of a Hugging Face directory, to read chosen tensors: safetensors or pickles, whole or sharded."""

import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vpgtrans.errors import CheckpointError, ReferenceError_
from vpgtrans.parts import read_object

T = TypeVar("T")

_WHOLE = ("model.safetensors", "pytorch_model.bin")
"""In the order of preference, which is that of `transformers`: each comes before its own index of shards."""

_DAMAGE = (
    *(OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError),
    # what torch's unpickler was seen to raise on damaged pickles besides
    *(ValueError, LookupError, AssertionError, struct.error),
)


class CheckpointFiles:
    """Where each tensor of a checkpoint directory lies. Nothing is read before it is asked for, and nothing else.

    All methods raise ReferenceError_ where there are no weights and CheckpointError where the index or a file of
    weights is damaged or missing.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @cached_property
    def _places(self) -> dict[str, Path]:
        """tensor name -> file."""
        for stem in _WHOLE:
            whole, index = self.directory / stem, self.directory / f"{stem}.index.json"
            if whole.is_file():
                return dict.fromkeys(_names(whole), whole)
            if index.is_file():
                return self._indexed(index)
        raise ReferenceError_(
            f"{self.directory}: no weights; looked for model.safetensors, pytorch_model.bin and the .index.json of both"
        )

    def _indexed(self, index: Path) -> dict[str, Path]:
        table = read_object(index, otherwise=CheckpointError).get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            raise CheckpointError(f"{index}: not an index of shards: weight_map must say for each tensor in which file")
        for name, file in table.items():
            if Path(file).name != file:
                raise CheckpointError(f"{index}: {name} lies in {file!r}; a shard must lie beside the index")
        return {name: self.directory / file for name, file in table.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All tensors' names, in the checkpoint's order."""
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, as stored. Raises CheckpointError where the checkpoint has none of that name."""
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in their stored dtypes; each file is opened once.

        Raises CheckpointError where the checkpoint lacks one of them.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._places:
                raise CheckpointError(f"{self.directory}: no tensor {name}")
            wanted.setdefault(self._places[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            if not file.is_file():
                raise CheckpointError(f"{file}: missing, but the index says that {inside[0]} lies in it")
            tensors.update(_read(file, inside))
        return tensors

    def first_of(self, names: list[str]) -> Tensor:
        """The first of `names` that the checkpoint has. Raises CheckpointError with all of them where none is there."""
        for name in names:
            if name in self:
                return self.read(name)
        raise CheckpointError(f"{self.directory}: none of these tensors is there: {', '.join(names)}")

    def under(self, prefixes: Iterable[str]) -> dict[str, Tensor]:
        """The tensors below the first of `prefixes` that the checkpoint has, by their names without it.

        Raises CheckpointError where there is nothing below any of them.
        """
        prefixes = list(prefixes)
        for prefix in prefixes:
            chosen = {name: name[len(prefix) :] for name in self.names() if name.startswith(prefix)}
            if chosen:
                return {chosen[name]: tensor for name, tensor in self.read_all(chosen).items()}
        raise CheckpointError(f"{self.directory}: holds no tensor below any of {prefixes}")


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth` file, memory-mapped where its format allows: what is not read costs nothing.

    Plain tensors only, no code is run. Raises CheckpointError where the file is damaged or holds something else.
    """
    # The format before torch 1.6 is no zip file and can't be memory-mapped.
    mapped = zipfile.is_zipfile(path)
    state = _guarded(path, lambda: torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: must hold a dict of tensors, holds a {type(state).__name__}")
    return state


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(read_pickle(path))
    return _guarded(path, lambda: _safetensors(path, [])[0])


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    if path.suffix != ".bin":
        return _guarded(path, lambda: _safetensors(path, names)[1])
    everything = read_pickle(path)
    for name in names:
        if not isinstance(everything.get(name), Tensor):
            raise CheckpointError(f"{path}: holds no tensor {name}, which must lie there")
    return {name: everything[name].clone() for name in names}


def _safetensors(path: Path, names: list[str]) -> tuple[list[str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys()), {name: file.get_tensor(name) for name in names}


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: not readable as weights ({error!r})") from error
