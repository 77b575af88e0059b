"""Files below a directory, reached without following a link on the way, whoever puts one there meanwhile.

A path from an index is text that a stranger wrote. Checking the text is not enough: a link on the disk may lead
anywhere. So each directory on the way is opened from the one before it, and the system refuses links.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vpgtrans.errors import IntegrityError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def directory(root: Path, parts: Sequence[str] = (), *, make: bool = False) -> Iterator[int]:
    """A descriptor of root/parts[0]/parts[1]/…; links above and in root itself are followed, below it not.

    make: directories that aren't there are made.

    Raises:
        IntegrityError: there is a link or a file on the way. OSError: as of `os.open`.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for depth, part in enumerate(parts):
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            try:
                deeper = os.open(part, _DIRECTORY, dir_fd=descriptor)
            except NotADirectoryError:
                raise _in_the_way(root.joinpath(*parts[: depth + 1]), part, descriptor) from None
            os.close(descriptor)
            descriptor = deeper
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(root: Path, path: str, flags: int = os.O_RDONLY, *, mode: int = 0o644) -> int:
    """A descriptor of a plain file at a relative path with forward slashes. Its directories are made if it may be.

    Raises:
        IntegrityError: there is a link on the way or at its end, or something that is no plain file.
        OSError: as of `os.open`.
    """
    *parents, name = path.split("/")
    with directory(root, parents, make=bool(flags & os.O_CREAT)) as parent:
        try:
            # A pipe would wait for its other end.
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=parent)
        except OSError:
            if _is_plain(name, parent):
                raise
            raise _in_the_way(root / path, name, parent) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{root / path} is no plain file; an entry holds plain files in plain directories")
    return descriptor


def _is_plain(name: str, parent: int) -> bool:
    """Whether it is a plain file, or isn't there."""
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except OSError:
        return True


def _in_the_way(path: Path, name: str, parent: int) -> IntegrityError:
    is_link = stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    return IntegrityError(
        f"{path} is {'a link' if is_link else 'no directory and no plain file'}; links are not followed"
    )
