"""One part of a VLM on disk: a directory with `config.json` and `model.safetensors`, read strictly."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vpgtrans.errors import CheckpointError, VpgTransError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def load_strict(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy `state` into `module`'s tensors (cast to the module's dtypes), or say exactly what does not fit.

    Raises:
        CheckpointError: a tensor is missing, extra or has another shape; the message names it and `where`.
    """
    check_fit(module.state_dict(), state, what=type(module).__name__, where=where)
    module.load_state_dict(dict(state), strict=True)


def check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, what: str, where: str) -> None:
    """Compare the names and shapes of `state` with those of `what`.

    Raises:
        CheckpointError: naming every tensor that is missing, extra or mis-shaped, and `where`.
    """
    problems = [f"missing {name} {list(tensor.shape)}" for name, tensor in expected.items() if name not in state]
    problems += [f"unexpected {name} {list(tensor.shape)}" for name, tensor in state.items() if name not in expected]
    for name, tensor in state.items():
        if name in expected and tensor.shape != expected[name].shape:
            problems.append(f"{name} is {list(tensor.shape)}, must be {list(expected[name].shape)}")
    if problems:
        shown = "; ".join(problems[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{where}: the weights do not fit the {what}: {shown}{more}")


def save_part(directory: str | Path, config: Mapping[str, Any], *, state: Mapping[str, Tensor] | None) -> None:
    """Write a part. `state` None writes the config alone (an encoder that is a reference)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    _replace(directory / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    if state is not None:
        # safetensors refuses tensors that share storage, and tensors that are views.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        _replace(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def read_config(directory: str | Path) -> dict[str, Any]:
    """The part's config. Raises CheckpointError when it is missing or no JSON object."""
    return read_object(Path(directory) / CONFIG_FILE, otherwise=CheckpointError)


def read_object(path: Path, *, otherwise: type[VpgTransError]) -> dict[str, Any]:
    """The JSON object in a file. Raises `otherwise` when it is missing or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise otherwise(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise otherwise(f"{path}: must hold a JSON object, holds a {type(value).__name__}")
    return value


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The part's tensors, on the CPU, in their stored dtypes. Raises CheckpointError when unreadable."""
    path = Path(directory) / WEIGHTS_FILE
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory when contiguous, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names.

    Manifests of VLM directories hold such hashes: with another format they could no longer be checked.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The one floating dtype of all tensors, float32 where they differ."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _replace(path: Path, write: Any) -> None:
    """Write beside `path`, then rename: a killed process leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
