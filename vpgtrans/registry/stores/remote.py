"""Files behind a URL that fsspec opens: S3, Google Cloud Storage, Azure, a file system in memory."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpgtrans.errors import StoreError, VpgTransError
from vpgtrans.registry.entry import FileEntry
from vpgtrans.registry.stores.limits import patience, watched
from vpgtrans.registry.stores.messages import reason, shown

_EXTRAS = {"s3": "pip install 'vpgtrans[s3]'", "gs": "pip install gcsfs", "gcs": "pip install gcsfs"}
_SMALLEST, _LARGEST = 1 << 18, 1 << 25
"""Bytes of one request: from the first to what arrives in a second or so."""


class RemoteStore:
    """A directory of a file system that fsspec knows. Credentials are those that its library finds by itself."""

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self.scheme = location.partition(":")[0]
        with self._reaching(self.location):
            # Not fsspec.open: that reads `a::b` as a chain of file systems.
            self.filesystem = _filesystem(self.scheme)
            self.path = self.filesystem._strip_protocol(self.location).rstrip("/")

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        # One byte more says that a file is larger than it should be.
        return self.read_path(file.path, start=start, most=file.size + 1)

    def read_path(self, name: str, *, start: int = 0, most: int) -> Iterator[bytes]:
        """Up to `most` bytes, piece by piece: the file systems' own readers read ahead as much as they like."""
        path = f"{self.path}/{name}"
        with self._reaching(f"{self.location}/{name}"):
            end = min(self.filesystem.info(path)["size"], most)
            step = _SMALLEST
            while start < end:
                began = time.monotonic()
                piece = self.filesystem.cat_file(path, start=start, end=min(start + step, end))
                seconds = time.monotonic() - began
                if not piece:
                    return
                yield piece
                start += len(piece)
                step = min(2 * step, _LARGEST) if seconds < 0.5 else max(step // 2, _SMALLEST) if seconds > 2 else step

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        """One file after the other: nobody looks for them before an entry names them."""
        with self._reaching(self.location):
            self.filesystem.invalidate_cache()
            there = {path[len(self.path) + 1 :] for path in self.filesystem.find(self.path)}
        if other := sorted(there - {file.path for file in files}):
            raise StoreError(f"{shown(self.location)} is there already, with {other[0]} in it")
        for file in files:
            place = f"{self.path}/{file.path}"
            if file.path not in there:
                with self._reaching(f"{self.location}/{file.path}"), contextlib.suppress(FileExistsError):
                    # Refused where another one has put a file there meanwhile, which is compared then.
                    self.filesystem.put_file(str(directory / file.path), place, mode="create")
                    continue
            self._is_same(file)
        return self.location

    def _is_same(self, file: FileEntry) -> None:
        """Raises StoreError where the file that is there already is another one."""
        place = f"{self.location}/{file.path}"
        digest = hashlib.sha256()
        for piece in watched(lambda: self.read(file), what=shown(place)):
            digest.update(piece)
        if digest.hexdigest() != file.sha256:
            raise StoreError(f"{shown(place)} is there already, with something else in it")

    @contextlib.contextmanager
    def _reaching(self, place: str) -> Iterator[None]:
        """Whatever a file system raises in here, as StoreError."""
        try:
            yield
        except (VpgTransError, FileExistsError):
            raise
        except ImportError as error:
            how = _EXTRAS.get(self.scheme, "install what it needs")
            raise StoreError(f"{shown(place)}: {reason(error)}; {how}") from error
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise StoreError(f"{shown(place)}: no such file") from error
        except PermissionError as error:
            raise StoreError(f"{shown(place)}: may not be accessed ({reason(error)})") from error
        except Exception as error:  # each file system has errors of its own
            # Credentials that are missing will be missing again; what is an OSError is mostly the network's.
            raise StoreError(f"{shown(place)}: {reason(error)}", again=isinstance(error, OSError)) from error


def _filesystem(scheme: str) -> Any:
    import fsspec

    # fsspec keeps file systems by their arguments, but endpoint and credentials may come from the environment.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": scheme != "memory"}
    if scheme == "s3":
        limits = {"connect_timeout": patience(), "read_timeout": patience(), "retries": {"max_attempts": 1}}
        options |= {"config_kwargs": limits}
    filesystem = fsspec.filesystem(scheme, **options)
    if scheme == "s3":
        filesystem.retries = 2  # of s3fs's own, each of which waits as long as botocore does
    return filesystem
