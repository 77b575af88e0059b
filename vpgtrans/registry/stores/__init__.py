"""Where a checkpoint's files lie: directories and URLs through fsspec, OCI registries, the Hugging Face hub.

A store moves bytes. It parses none of them, and trusts none: sizes and hashes are the caller's to compare.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from vpgtrans.registry.entry import FileEntry


class Store(Protocol):
    """One location of an entry."""

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on, a few hundred KB at a time; may end early, never sends more than it has.

        Raises:
            StoreError: it isn't there, the server doesn't answer, or answers with an error. `again` says if it may help
                to ask once more.
        """
        ...

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        """Put files from below a directory into the store, all of them or none that anybody sees.

        Returns:
            the location as an entry names it, pinned where the store can (a digest, a revision).

        Raises:
            StoreError: as of `read`; or there is something else under this name.
        """
        ...
