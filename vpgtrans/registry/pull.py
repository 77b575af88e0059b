"""Bring a checkpoint into the cache: every byte counted and hashed before anything looks into it.

    $VPGTRANS_CACHE/registry/ID@VERSION-KEY/         a whole checkpoint; KEY stands for its files' paths and hashes
    $VPGTRANS_CACHE/registry/.pulling/KEY/           one on its way: files that are whole, and the first part of another

A checkpoint appears by one rename, so what is there is whole. What is on its way stays when a process is killed or a
connection breaks, and the next call goes on from there. Nothing is written through a link, and nothing outside the
cache. Of several processes that pull the same one works and the others wait.
"""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

from vpgtrans.errors import IntegrityError, MachineError, RegistryError, StoreError
from vpgtrans.files import key_digest
from vpgtrans.references import cache_dir, digest
from vpgtrans.registry import below
from vpgtrans.registry.entry import Entry, FileEntry
from vpgtrans.registry.safetensors_header import header_of
from vpgtrans.registry.stores import Store, open_store
from vpgtrans.registry.stores.limits import persistently, watched
from vpgtrans.registry.stores.messages import shown

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_SPARE = 64 << 20
"""Bytes that must stay free on the disk."""

Progress = Callable[[int], None]
"""Told how many bytes of an entry are there."""


def pull(entry: Entry, *, index: str, progress: Progress | None = None) -> Path:
    """A directory in the cache with all files of an entry, each of the size and the sha256 that the entry says.

    Without network where it is there already. Its locations are tried in order.

    index: path or URL of the index that the entry is from.

    Raises:
        IntegrityError: no location has these files, and at least one has others; or the cache holds links.
        StoreError: no location can be reached. RegistryError: none can be opened.
        MachineError: the cache can't be written.
    """
    if entry.status == "yanked":
        log.warning("%s was yanked: %s", entry.name, entry.reason)
    copy = _Copy(entry, progress or (lambda _: None))
    try:
        if copy.problem() is None:
            return copy.path
        copy.root.mkdir(parents=True, exist_ok=True)
        with copy.alone():
            problem = copy.problem()  # another process may have pulled it meanwhile
            if problem is None:
                return copy.path
            if copy.path.is_dir():
                log.warning("%s is damaged (%s); what is wrong is pulled again", copy.path, problem)
            copy.pull(index)
    except OSError as error:
        why = error.strerror or error
        raise MachineError(f"the cache {copy.root} can't be used: {why}; $VPGTRANS_CACHE names another") from error
    return copy.path


def at_hand(entry: Entry) -> Path | None:
    """The directory in the cache, if it is there and as it should be."""
    copy = _Copy(entry, lambda _: None)
    return copy.path if copy.problem() is None else None


class _Copy:
    """An entry in the cache, or on its way there. Paths are relative to the cache, and no link is followed."""

    def __init__(self, entry: Entry, progress: Progress) -> None:
        self.entry = entry
        self.root = cache_dir()
        key = key_digest({"files": [[file.path, file.size, file.sha256] for file in entry.files]})
        self.name = f"{entry.name}-{key[:16]}"
        self.path = self.root / "registry" / self.name
        self.key = key[:32]
        self.staging = f"registry/.pulling/{self.key}"
        self.done = 0
        """Bytes of files that are whole."""
        self.came = 0
        """Bytes that stores sent."""
        self.progress = progress

    # --- what is there --------------------------------------------------------------------------

    def problem(self) -> str | None:
        """What is wrong with the copy in the cache; None if nothing is."""
        if not os.path.lexists(self.path):
            return "it isn't there"
        with below.directory(self.root, ("registry", self.name)):
            pass  # a link in its place is an error: somebody put it there
        problems = (self._problem_of(f"registry/{self.name}", file) for file in self.entry.files)
        return next((problem for problem in problems if problem is not None), None)

    def _problem_of(self, directory: str, file: FileEntry) -> str | None:
        try:
            os.close(below.open_file(self.root, f"{directory}/{file.path}"))
            actual = digest(self.root / directory / file.path).hex()
        except IntegrityError as error:
            return str(error)
        except OSError as error:
            return f"{file.path}: {error.strerror}"
        return None if actual == file.sha256 else f"{file.path} has sha256 {actual}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the block no other process pulls the same; it is waited for."""
        descriptor = below.open_file(self.root, f"{self.staging}.lock", os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process pulls %s; waiting for it", self.entry.name)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    # --- pulling --------------------------------------------------------------------------------

    def pull(self, index: str) -> None:
        """From the locations in order, then into its place."""
        if self.path.is_dir():
            self._set_aside()
        missing = [file for file in self.entry.files if not self._keep(file)]
        self._check_room(missing)
        log.info("pulling %s (%s MB) to %s", self.entry.name, f"{self.entry.size / 1e6:,.1f}", self.path)
        failures: list[IntegrityError | RegistryError | StoreError] = []
        for location in self.entry.locations:
            try:
                store = open_store(location, index=index)
                while missing:
                    self._fetch(store, missing[0], place=f"{shown(location)}: {missing[0].path}")
                    del missing[0]
                break
            except (IntegrityError, RegistryError, StoreError) as error:
                failures.append(error)
                log.info("%s", error)
        if missing:
            raise _verdict(self.entry.name, failures)
        self._look_into()
        self._appear()

    def _set_aside(self) -> None:
        """A damaged copy becomes a place to take whole files from."""
        with self._directory() as staging, below.directory(self.root, ("registry",)) as registry:
            with suppress(FileNotFoundError):
                shutil.rmtree("before", dir_fd=staging)
            os.rename(self.name, "before", src_dir_fd=registry, dst_dir_fd=staging)

    def _keep(self, file: FileEntry) -> bool:
        """Whether a file is whole already, of an interrupted call or a damaged copy."""
        for place in ("whole", "before"):
            problem = self._problem_of(f"{self.staging}/{place}", file)
            if problem is None:
                if place == "before":
                    self._move(f"before/{file.path}", f"whole/{file.path}")
                self._report(whole=file.size)
                return True
        with suppress(FileNotFoundError):
            self._remove(f"whole/{file.path}")
        return False

    def _check_room(self, files: Sequence[FileEntry]) -> None:
        """A size that an index claims may be any number; so it is asked first whether it fits."""
        needed = sum(file.size for file in files) + _SPARE
        free = shutil.disk_usage(self.root).free
        with self._directory("part") as parts:
            for name in os.listdir(parts):
                needed -= os.stat(name, dir_fd=parts, follow_symlinks=False).st_size
        if needed > free:
            raise MachineError(
                f"{self.entry.name} needs {needed / 1e9:,.1f} GB and {self.root} has {free / 1e9:,.1f} GB free; "
                "$VPGTRANS_CACHE names another place"
            )

    def _fetch(self, store: Store, file: FileEntry, *, place: str) -> None:
        """One file from one location: as often as it takes, and anew where what lay here already was wrong."""
        fresh = not os.path.lexists(self.root / self.staging / "part" / file.sha256)
        while True:
            try:
                persistently(partial(self._stream, store, file, place), came=lambda: self.came)
                break
            except IntegrityError:
                with suppress(FileNotFoundError):
                    self._remove(f"part/{file.sha256}")
                if fresh:
                    raise
                fresh = True
        self._move(f"part/{file.sha256}", f"whole/{file.path}")
        self._report(whole=file.size)

    def _stream(self, store: Store, file: FileEntry, place: str) -> None:
        """What is missing of a file, hashed while it comes; never more than it should have.

        Raises:
            IntegrityError: it is larger, smaller or another one. StoreError: as of `Store.read`.
        """
        descriptor = below.open_file(self.root, f"{self.staging}/part/{file.sha256}", os.O_RDWR | os.O_CREAT)
        with open(descriptor, "r+b", buffering=0) as stream:
            sha256, size = hashlib.sha256(), 0
            while piece := stream.read(_CHUNK):
                sha256.update(piece)
                size += len(piece)
            if size < file.size or not size:  # of an empty file it is asked whether it is one
                for piece in watched(partial(store.read, file, start=size), what=place):
                    size += len(piece)
                    self.came += len(piece)
                    if size > file.size:
                        raise IntegrityError(f"{place} is larger than the {file.size:,} bytes that the index says")
                    _write(stream.fileno(), piece)
                    sha256.update(piece)
                    self._report(part=size)
                os.fsync(stream.fileno())
        if size != file.size:
            raise IntegrityError(f"{place} has {size:,} bytes, the index says {file.size:,}")
        if sha256.hexdigest() != file.sha256:
            raise IntegrityError(f"{place} has sha256 {sha256.hexdigest()}, the index says {file.sha256}")

    def _look_into(self) -> None:
        """Weights are safetensors, whatever an index calls a file."""
        for file in self.entry.files:
            if file.path.endswith(".safetensors"):
                descriptor = below.open_file(self.root, f"{self.staging}/whole/{file.path}")
                with open(descriptor, "rb") as stream:
                    header_of(stream, name=f"{self.entry.name}: {file.path}")

    def _appear(self) -> None:
        with self._directory() as staging, below.directory(self.root, ("registry",)) as registry:
            os.rename("whole", self.name, src_dir_fd=staging, dst_dir_fd=registry)
            os.fsync(registry)
        with below.directory(self.root, ("registry", ".pulling")) as pulling:
            shutil.rmtree(self.key, dir_fd=pulling)

    # --- below the staging directory ------------------------------------------------------------

    def _directory(self, *parts: str) -> AbstractContextManager[int]:
        """A descriptor; the directory is made if need be."""
        return below.directory(self.root, [*self.staging.split("/"), *parts], make=True)

    def _move(self, source: str, target: str) -> None:
        *above, name = source.split("/")
        *parents, renamed = target.split("/")
        with self._directory(*above) as here, self._directory(*parents) as there:
            os.rename(name, renamed, src_dir_fd=here, dst_dir_fd=there)

    def _remove(self, path: str) -> None:
        *above, name = path.split("/")
        with self._directory(*above) as here:
            os.unlink(name, dir_fd=here)

    def _report(self, *, whole: int = 0, part: int = 0) -> None:
        self.done += whole
        self.progress(self.done + part)


def _write(descriptor: int, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        left = left[os.write(descriptor, left) :]


def _verdict(name: str, failures: Sequence[Exception]) -> Exception:
    """One error for all locations: a file that is wrong counts most, then a server that doesn't answer."""
    kind = next(
        (kind for kind in (IntegrityError, StoreError) if any(isinstance(failure, kind) for failure in failures)),
        RegistryError,
    )
    return kind(f"{name} can't be pulled: {'; '.join(map(str, failures))}")
