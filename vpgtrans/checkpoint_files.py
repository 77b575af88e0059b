"""The weight files of a Hugging Face directory, for reading single tensors: safetensors or pickles, sharded or not."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vpgtrans.errors import CheckpointError


class CheckpointFiles:
    """Where each tensor of a checkpoint directory lies. Nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def _places(self) -> dict[str, Path]:
        """tensor name -> file. Safetensors are preferred where both formats lie."""
        for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
            index = self.directory / f"{stem}{suffix}.index.json"
            if index.is_file():
                return self._indexed(index)
            whole = self.directory / f"{stem}{suffix}"
            if whole.is_file():
                return dict.fromkeys(self._names(whole), whole)
        raise CheckpointError(
            f"{self.directory}: no weights found. Tried: model.safetensors, pytorch_model.bin and the index of either"
        )

    def _indexed(self, index: Path) -> dict[str, Path]:
        try:
            table = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"{index}: not an index of shards: {error}") from error
        places = {}
        for name, file in table.items():
            if Path(file).name != file:
                raise CheckpointError(f"{index}: {name} lies in {file!r}; a shard must lie beside the index")
            places[name] = self.directory / file
        return places

    def _names(self, file: Path) -> Iterable[str]:
        if file.suffix == ".bin":
            return self._pickle(file).keys()
        try:
            with safe_open(file, framework="pt") as tensors:
                return list(tensors.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged: {error}") from error

    def _pickle(self, file: Path) -> dict[str, Tensor]:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # the format before torch 1.6 can't be memory-mapped
            return torch.load(file, map_location="cpu", weights_only=True)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """All tensors' names, in the checkpoint's order."""
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """One tensor, as stored. Raises CheckpointError where it is missing or its file is damaged."""
        if name not in self._places:
            raise CheckpointError(f"{self.directory}: no tensor {name}")
        file = self._places[name]
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, but the index says that {name} lies in it")
        if file.suffix == ".bin":
            return self._pickle(file)[name].clone()
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: {name} can't be read: {error}") from error

    def first_of(self, names: list[str]) -> Tensor:
        """The first of `names` that the checkpoint has. Raises CheckpointError with all of them where none is there."""
        for name in names:
            if name in self:
                return self.read(name)
        raise CheckpointError(f"{self.directory}: none of these tensors is there: {', '.join(names)}")
