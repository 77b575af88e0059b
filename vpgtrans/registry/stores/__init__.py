"""Where a checkpoint's files lie: directories and URLs through fsspec, OCI registries, the Hugging Face hub.

A store moves bytes. It parses none of them, and trusts none: sizes and hashes are the caller's to compare.

Credentials come from the environment or from the libraries' own log-in (`aws configure`, `docker login`, `hf auth
login`, ~/.netrc), and no message names them: a URL is shown without what may be a secret in it.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

from vpgtrans.errors import RegistryError
from vpgtrans.registry.entry import SCHEMES, FileEntry, safe_location
from vpgtrans.registry.stores.limits import persistently, watched
from vpgtrans.registry.stores.messages import shown


class Store(Protocol):
    """One location of an entry."""

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on, some at a time; may end early, and may be more than declared.

        Raises:
            StoreError: it isn't there, the server doesn't answer, or answers with an error. `again` says if it may help
                to ask once more. IntegrityError: there is something else than a plain file.
        """
        ...

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        """Put files from below a directory into the store, all of them or none that anybody sees.

        What an interrupted call left behind is no hindrance to the next.

        Returns:
            the location as an entry names it, pinned where the store can (a digest, a revision).

        Raises:
            StoreError: as of `read`; or there is something else under this name.
        """
        ...


def open_store(location: str, *, index: str) -> Store:
    """The store behind a location as an entry names it, or as `--to` does.

    location: a path relative to the index, hf:ORG/REPO[@REVISION], oci:HOST/REPO[:TAG|@DIGEST] or a URL.
    index: path or URL of the index that names it.

    Raises:
        RegistryError: it is none of these, or lies on this machine while the index doesn't. StoreError: what opens such
            a location is not installed.
    """
    try:
        safe_location(location)
        _ = urlsplit(location).port  # which raises for none that there is
    except ValueError as error:
        raise RegistryError(f"{shown(location)[:200]!r} is no location: {error}") from error
    scheme, colon, _ = location.partition(":")
    if colon:
        if scheme == "file" and is_url(index):
            raise RegistryError(f"{location}: an index at a URL can't name files of this machine")
        return _open(scheme, location)
    if not is_url(index):
        from vpgtrans.registry.stores.directory import DirectoryStore

        return DirectoryStore(Path(index).resolve().parent, location)
    scheme, _, rest = index.partition("://")
    if scheme in ("http", "https"):
        rest, location = rest.partition("?")[0].partition("#")[0], quote(location)
    return _open(scheme, f"{scheme}://{rest.rpartition('/')[0]}/{location}")


def _open(scheme: str, url: str) -> Store:
    # Each imported when it is needed: their libraries are large, and some are extras.
    if scheme == "file":
        from vpgtrans.registry.stores.directory import DirectoryStore

        return DirectoryStore.at(url)
    if scheme == "hf":
        from vpgtrans.registry.stores.hub import HubStore

        return HubStore(url)
    if scheme == "oci":
        from vpgtrans.registry.stores.oci import OciStore

        return OciStore(url)
    if scheme in ("http", "https"):
        from vpgtrans.registry.stores.http import HttpStore

        return HttpStore(url)
    from vpgtrans.registry.stores.remote import RemoteStore

    return RemoteStore(url)


def read_small(url: str, limit: int) -> bytes:
    """A whole file at a URL, such as an index.

    Raises:
        RegistryError: it is larger than `limit` bytes, or no kind of URL that a store reads. StoreError: as of
            `Store.read`.
    """
    scheme = url.partition("://")[0]
    if scheme not in set(SCHEMES) - {"hf", "oci", "file"}:
        raise RegistryError(
            f"{shown(url)}: write the URL of an index with one of: http://, https://, s3://, gs://, az://"
        )
    if scheme in ("http", "https"):
        from vpgtrans.registry.stores.http import fetch

        start = partial(fetch, url)
    else:
        from vpgtrans.registry.stores.remote import RemoteStore

        directory, _, name = url.rpartition("/")
        start = partial(RemoteStore(directory).read_path, name, most=limit + 1)

    def read() -> bytes:
        content = bytearray()
        for piece in watched(start, what=shown(url)):
            content += piece
            if len(content) > limit:
                raise RegistryError(f"{shown(url)} is larger than {limit:,} bytes, which no index is")
        return bytes(content)

    return persistently(read)


def is_url(place: str) -> bool:
    """Whether an index lies elsewhere; a path of this machine otherwise."""
    return "://" in place


def location_of(directory: Path, *, index: str) -> str:
    """A directory of this machine as an entry of an index names it: relative where it lies below the index's.

    Raises:
        RegistryError: it has a name that an entry can't hold, or the index lies elsewhere.
    """
    if is_url(index):
        raise RegistryError(f"{directory}: an index at a URL can't name files of this machine")
    place, home = directory.resolve(), Path(index).resolve().parent
    below = place != home and place.is_relative_to(home)
    location = place.relative_to(home).as_posix() if below else place.as_uri()
    try:
        return safe_location(location)
    except ValueError as error:
        raise RegistryError(str(error)) from error
