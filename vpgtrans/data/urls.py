"""Reading from fsspec URLs: whatever a file system raises becomes one message that names the URL."""

import contextlib
from collections.abc import Iterator
from typing import Any

from vpgtrans.errors import DataError


def resolve(url: str) -> tuple[Any, str]:
    """The file system of a URL or local path, and the path in it.

    Raises:
        DataError: there is no such kind of URL, or its file system is not installed.
    """
    import fsspec

    with reaching(url):
        return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Failures in here as DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # each file system has errors of its own: HTTP, clouds, missing packages
        missing = isinstance(error, FileNotFoundError)
        raise DataError(f"{url}: {'no such file' if missing else error or type(error).__name__}") from error


def read(url: str) -> bytes:
    """The whole content; DataError as `resolve`."""
    filesystem, path = resolve(url)
    with reaching(url):
        return filesystem.cat_file(path)
