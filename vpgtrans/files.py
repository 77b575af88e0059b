"""Files that appear whole or not at all, in directories that one process writes to."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vpgtrans.errors import DataError, IntegrityError, OutputError


def temporary_of(target: Path) -> Path:
    """Where a file is written before it appears: beside its place, so that it can be renamed."""
    return target.with_name(f".{target.name}.part")


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` when the block ends without an error.

    It is on the disk before it has the name: a power cut leaves the old file or the new one.
    """
    temporary = temporary_of(target)
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(temporary)
    os.replace(temporary, target)
    sync(target.parent)


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """A directory (made if need be) that no other process owns meanwhile; it is free again when the process ends.

    Raises:
        OutputError: another process owns it, or it can't be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"{directory} can't be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{directory}: another process is writing it") from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(file: Path, *, busy: str) -> Iterator[None]:
    """Within the block no other process is in one with the same file, which is made if need be and stays.

    Processes that this one forks don't hold it, so it is free as soon as this one is gone. Where the file system knows
    no locks, nothing is held.

    Raises:
        OutputError: another process is in such a block; the message is `busy`.
    """
    with file.open("a") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise OutputError(busy) from error
        yield


def key_digest(key: Mapping[str, Any]) -> str:
    """A name for what is kept under a key of plain values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, key: Mapping[str, Any]) -> None:
    """Arrays in one file, whole or not at all, with a key of plain values that says what they were made of."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as temporary:
        temporary.write_bytes(save(plain, {"key": json.dumps(key), "content": _content(plain)}))


def read_arrays(path: Path, names: Sequence[str], *, key: Mapping[str, Any], what: str) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote.

    Raises:
        DataError: it was made of something else, or isn't there. IntegrityError: the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        if not path.exists():
            raise DataError(f"{path}: there is no {what} here") from error
        raise IntegrityError(f"{path} is no {what}, or damaged ({error}): remove it") from error
    if set(arrays) != set(names) or metadata.get("content") != _content(arrays):
        raise IntegrityError(f"{path}: the {what} is damaged: remove it")
    found = json.loads(metadata["key"])
    if other := [name for name in key if found.get(name) != key[name]]:
        raise DataError(f"{path} is a {what} with another {' and '.join(other)}: remove it, and it is made anew")
    return arrays


def _content(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
"""What file systems say that keep names by themselves, and flush no directory."""


def sync(path: Path) -> None:
    """Flush a file or a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
