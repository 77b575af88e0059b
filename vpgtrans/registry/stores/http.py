"""Files from web servers: from any byte on, with time limits, and from the host that was asked.

Nothing is decompressed: what an index declares is what the server sends, so a small answer can't become a large file.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urljoin, urlsplit

from vpgtrans.errors import StoreError
from vpgtrans.registry.entry import FileEntry
from vpgtrans.registry.stores.limits import patience
from vpgtrans.registry.stores.messages import reason, shown

if TYPE_CHECKING:
    import requests

CHUNK = 1 << 20
_MOST_REDIRECTS = 5
_LONGEST_ANSWER = 4 << 20
"""Bytes of an answer that isn't a file: a token, a manifest."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Redirects = Literal["same host", "any host"]
"""any host: for stores that hand out files from others' servers. From https only to https, and without credentials."""
Authorise = Callable[["requests.PreparedRequest"], "requests.PreparedRequest"]


class HttpStore:
    """A directory of a web server; it can only be read."""

    def __init__(self, location: str) -> None:
        self.location = location
        # What follows the path, as Azure's signatures do, is for every file below it.
        self._home, self._mark, self._query = location.partition("?")

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        return fetch(f"{self._home.rstrip('/')}/{quote(file.path)}{self._mark}{self._query}", start=start)

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        raise StoreError(
            f"{shown(self.location)}: a web server can't be written to; name s3://…, oci:…, hf:… or a directory"
        )


def fetch(
    url: str,
    *,
    start: int = 0,
    redirects: Redirects = "same host",
    session: "requests.Session | None" = None,
    authorise: Authorise | None = None,
) -> Iterator[bytes]:
    """The body of a URL from a byte on, as it comes.

    authorise: puts credentials into a request to the URL's own host; without it ~/.netrc is asked.

    Raises:
        StoreError
    """
    with reaching(url), _get(url, start, redirects, session or new_session(), authorise) as response:
        if response.status_code == 416:  # there is nothing from there on
            return
        skip = _beginning(response, url, start)
        while chunk := response.raw.read1(CHUNK, decode_content=False):
            if skip:
                skip, chunk = max(0, skip - len(chunk)), chunk[skip:]
            if chunk:
                yield chunk


def new_session() -> "requests.Session":
    """A session whose every request has time limits, and that sends credentials over TLS only (or to this machine)."""
    import requests
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
            parts = urlsplit(request.url or "")
            if parts.scheme != "https" and "Authorization" in request.headers and parts.hostname not in LOOPBACK:
                raise StoreError(f"{shown(request.url or '')}: credentials are only sent over https")
            # What was sent may take a registry a while to take in.
            writes = request.method not in ("GET", "HEAD")
            options["timeout"] = (patience(), patience() * (15 if writes else 1))
            return super().send(request, *arguments, **options)

    class Session(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> None:
            """Whether to follow is decided in `_get`, whoever sends the request."""

        def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
            """What isn't read piece by piece is read here, up to a limit."""
            piecewise, options["stream"] = options.get("stream"), True
            response = super().send(request, **options)
            if not piecewise:
                with response:
                    content = response.raw.read(_LONGEST_ANSWER + 1, decode_content=True)
                if len(content) > _LONGEST_ANSWER:
                    raise StoreError(f"{shown(request.url or '')}: answers with more than {_LONGEST_ANSWER:,} bytes")
                response._content = content
            return response

    session = Session()
    session.mount("https://", Adapter())
    session.mount("http://", Adapter())
    session.headers["Accept-Encoding"] = "identity"
    return session


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """What requests and urllib3 raise in here, as StoreError."""
    import requests
    import urllib3

    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError, HTTPException, OSError, ValueError) as error:
        silent = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
        why = f"no answer within {patience():g} seconds" if silent else reason(error)
        # What is wrong with the URL itself stays wrong.
        again = not isinstance(error, ValueError)
        raise StoreError(f"{shown(url)}: {why}", again=again) from error


@contextmanager
def _get(
    url: str, start: int, redirects: Redirects, session: "requests.Session", authorise: Authorise | None
) -> "Iterator[requests.Response]":
    """The answer, redirects followed where they may be."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    place = url
    for _ in range(_MOST_REDIRECTS + 1):
        auth = authorise if _host(place) == _host(url) else None
        response = session.get(place, headers=headers, auth=auth, stream=True, allow_redirects=False)
        with response:
            if not response.is_redirect:
                check(response, place)
                yield response
                return
            onward = urljoin(place, response.headers["Location"])
        _may_follow(place, onward, redirects)
        place = onward
    raise StoreError(f"{shown(url)}: redirects without an end")


def _host(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _may_follow(url: str, onward: str, redirects: Redirects) -> None:
    here, there = _host(url), _host(onward)
    if there[0] not in ("http", "https") or (here[0] == "https" and there[0] != "https"):
        raise StoreError(f"{shown(url)}: redirects from {here[0]} to {there[0]}")
    if redirects == "same host" and here != there:
        raise StoreError(
            f"{shown(url)}: redirects to another host, {there[0]}://{there[1]}; name that one as the location"
        )


def check(response: "requests.Response", url: str, *, login: str | None = None) -> None:
    """Raises StoreError where an answer is not what was asked for. login: the command that gets credentials."""
    status = response.status_code
    if status in (200, 206, 416):
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise StoreError(f"{shown(url)}: is sent compressed ({encoding[:40]!r}), though it was asked for as it is")
        return
    said = {401: "wants credentials", 403: "may not be read", 404: "is not there", 410: "is no longer there"}
    what = said.get(status, "the server failed" if status >= 500 else "the server refuses")
    how = f"; {login}" if login and status in (401, 403) else ""
    raise StoreError(f"{shown(url)}: {what} ({status}){how}", again=status in _BUSY)


def _beginning(response: "requests.Response", url: str, start: int) -> int:
    """Bytes at the beginning of the answer that weren't asked for. Raises StoreError where it begins too late."""
    if response.status_code == 200:
        return start
    span = response.headers.get("Content-Range", "")
    if not span.startswith(f"bytes {start}-"):
        raise StoreError(f"{shown(url)}: was asked for bytes from {start} on, and sends {span[:80]!r}")
    return 0
