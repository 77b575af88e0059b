"""Files in a directory of this machine."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vpgtrans.errors import RegistryError, StoreError
from vpgtrans.files import owned, sync
from vpgtrans.references import file_sha256
from vpgtrans.registry import below
from vpgtrans.registry.entry import FileEntry

CHUNK = 1 << 20


class DirectoryStore:
    """`path` below `root`. No link below root is followed."""

    def __init__(self, root: Path, path: str) -> None:
        self.root = root
        self.path = path
        self.location = path

    @classmethod
    def at(cls, location: str) -> "DirectoryStore":
        """The store of `file:///PATH`. Raises RegistryError for a relative path."""
        parts = urlsplit(location)
        path = Path(url2pathname(parts.path))
        if parts.netloc not in ("", "localhost") or not path.is_absolute() or ".." in path.parts or "\0" in str(path):
            raise RegistryError(f"{location}: write file:///PATH, from the root on")
        store = cls(path.parent.resolve(), path.name)
        store.location = location
        return store

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        path = f"{self.path}/{file.path}"
        try:
            descriptor = below.open_file(self.root, path)
            with open(descriptor, "rb", buffering=0) as stream:
                stream.seek(start)
                while chunk := stream.read(CHUNK):
                    yield chunk
        except OSError as error:
            raise StoreError(f"{self.root / path}: {error.strerror or error}") from error

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        """Copied beside its place and renamed, so that it is there as a whole."""
        target = self.root / self.path
        # Always the same name, so that the next one clears away what a killed one left.
        scratch = target.parent / f".{target.name}.part"
        try:
            with owned(scratch):
                whole = scratch / "whole"
                shutil.rmtree(whole, ignore_errors=True)
                try:
                    _copy(directory, whole, files)
                    _rename(whole, target, files)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise StoreError(f"{target} can't be written: {error.strerror or error}") from error
        return self.location


def _copy(source: Path, target: Path, files: Sequence[FileEntry]) -> None:
    """Copy and flush to the disk."""
    target.mkdir()
    for file in files:
        place = target / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file.path, place, follow_symlinks=False)
        sync(place)
    for made in [target, *(path for path in target.rglob("*") if path.is_dir())]:
        sync(made)


def _rename(whole: Path, target: Path, files: Sequence[FileEntry]) -> None:
    try:
        whole.rename(target)
    except OSError as error:
        if not target.is_dir() or not _holds(target, files):
            raise StoreError(f"{target} is there already, with something else in it") from error
    sync(target.parent)


def _holds(directory: Path, files: Sequence[FileEntry]) -> bool:
    """Whether these files are all that is in a directory."""
    there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}
    return there == {file.path for file in files} and all(
        os.path.getsize(directory / file.path) == file.size and file_sha256(directory / file.path) == file.sha256
        for file in files
    )
