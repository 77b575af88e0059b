"""Files that appear whole or not at all, in directories that one process writes to."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from vpgtrans.errors import OutputError


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


def sync(path: Path) -> None:
    """Flush a file or a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
