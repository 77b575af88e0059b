"""Files in an OCI registry, as ghcr.io, Docker Hub and Harbor are: a blob a file, under its own sha256.

    oci:HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST]

The manifest lists the files with their paths as titles, as `oras push` does, so that `oras pull` gets them too. Reading
needs no manifest: the index knows each file's sha256, which is its name in the registry. Credentials are those of
`docker login` and `oras login`. This machine's own registries are spoken to without TLS.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vpgtrans.errors import RegistryError, StoreError, VpgTransError
from vpgtrans.registry.entry import FileEntry
from vpgtrans.registry.stores import http
from vpgtrans.registry.stores.messages import reason

if TYPE_CHECKING:
    import requests
    from oras.container import Container
    from oras.provider import Registry

_LOCATION = re.compile(
    r"oci:(?P<host>[a-z0-9-]+(?:\.[a-z0-9-]+)*(?::\d{1,5})?)/(?P<repository>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_ARTIFACT = "application/vnd.vpgtrans.checkpoint.v1"
_EMPTY = b"{}"


class OciStore:
    """A repository of an OCI registry, with the tag or the digest of one version."""

    def __init__(self, location: str) -> None:
        match = _LOCATION.fullmatch(location)
        if match is None or not {".", ":"} & set(match["host"]):
            raise RegistryError(f"{location}: write oci:HOST[:PORT]/REPOSITORY[:TAG|@sha256:DIGEST], in lower case")
        self.location = location
        self.host, self.repository, self.tag = match["host"], match["repository"], match["tag"]
        self._registry: Registry | None = None

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        blob = f"sha256:{file.sha256}"
        with self._asking(file.path) as registry:
            # A request of oras's own, since it gets the token that a registry wants.
            self._expect(registry.get_blob(self._container, blob, head=True), file.path)
            url = f"{registry.prefix}://{self._container.get_blob_url(blob)}"

        def authorise(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
            request.headers.update(_credentials(registry))
            return request

        # Many keep their blobs on other hosts. The sha256 says whether what these send is the blob.
        yield from http.fetch(url, start=start, redirects="any host", session=registry.session, authorise=authorise)

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        """Blobs first: they are part of nothing until the manifest names them."""
        if self.tag is None:
            raise RegistryError(f"{self.location}: name a tag to publish under: oci:{self.host}/{self.repository}:TAG")
        manifest = _manifest(files)
        pinned = f"oci:{self.host}/{self.repository}@{_digest(manifest)}"
        with self._asking("its manifest") as registry:
            place = f"{registry.prefix}://{self._container.manifest_url()}"
            there = registry.do_request(place, "GET", headers={"Accept": _MANIFEST})
            if there.status_code == 200 and there.content == manifest:
                return pinned
            if there.status_code != 404:
                self._expect(there, "its manifest")
                raise StoreError(f"{self.location} is there already, with something else in it")
        for file in files:
            with self._asking(file.path) as registry:
                layer = {"digest": f"sha256:{file.sha256}", "size": file.size}
                self._expect(registry.upload_blob(str(directory / file.path), self._container, layer), file.path)
        with self._asking("its manifest") as registry, tempfile.NamedTemporaryFile() as empty:
            empty.write(_EMPTY)
            empty.flush()
            layer = {"digest": _digest(_EMPTY), "size": len(_EMPTY)}
            self._expect(registry.upload_blob(empty.name, self._container, layer), "its config")
            done = registry.do_request(place, "PUT", headers={"Content-Type": _MANIFEST}, data=manifest)
            self._expect(done, "its manifest")
        return pinned

    @property
    def _container(self) -> "Container":
        from oras.container import Container

        return Container(f"{self.host}/{self.repository}:{self.tag or 'latest'}")

    @contextmanager
    def _asking(self, what: str) -> "Iterator[Registry]":
        """What oras raises in here, as StoreError."""
        place = f"{self.location}: {what}"
        try:
            with http.reaching(place):
                if self._registry is None:
                    self._registry = _connect(self.host, self._container)
                yield self._registry
        except ImportError as error:
            raise StoreError(f"{place}: {reason(error)}; pip install 'vpgtrans[oci]'") from error
        except VpgTransError:
            raise
        except Exception as error:  # oras raises ValueError for what a registry answers, and KeyError for what it lacks
            raise StoreError(f"{place}: {reason(error)}") from error

    def _expect(self, response: "requests.Response", what: str) -> None:
        """Raises StoreError where an answer is none of success. A blob may lie elsewhere."""
        if not response.ok:
            http.check(response, f"{self.location}: {what}", login=f"docker login {self.host}")


def _connect(host: str, container: "Container") -> "Registry":
    """oras's client with our time limits, and the kind of credentials that the registry asks for."""
    from oras.provider import Registry

    class Patient(Registry):
        def do_request(
            self, url: str, method: str = "GET", data: Any = None, headers: Any = None, **options: Any
        ) -> "requests.Response":
            headers = dict(headers or {})
            if urlsplit(url).netloc == self.hostname:
                # At once, since a file is sent once: the library asks without credentials first.
                headers |= _credentials(self)
            # Without the library's repeats, which go on for two minutes and send what is left of a file for the whole.
            return Registry.do_request.__wrapped__(self, url, method, data, headers, **options)

        def put_upload(self, blob: str, container: "Container", layer: dict[str, Any]) -> "requests.Response":
            # The library's reads the whole file into memory.
            begun = self.do_request(f"{self.prefix}://{container.upload_blob_url()}", "POST")
            place = self._get_location(begun, container)
            if not begun.ok or not place:
                return begun
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(layer["size"])}
            joint = "&" if "?" in place else "?"
            with open(blob, "rb") as stream:
                # An empty stream would be sent as one of unknown length.
                data = stream if layer["size"] else b""
                return self.do_request(f"{place}{joint}digest={layer['digest']}", "PUT", data=data, headers=headers)

    insecure = host.partition(":")[0] in http.LOOPBACK
    session = http.new_session()
    asked = session.get(f"{'http' if insecure else 'https'}://{host}/v2/")
    basic = asked.headers.get("WWW-Authenticate", "").lower().startswith("basic")
    registry = Patient(host, insecure=insecure, auth_backend="basic" if basic else "token")
    registry.session = registry.auth.session = session
    # oras looks into ~/.docker only.
    theirs = Path(os.environ.get("DOCKER_CONFIG", "")) / "config.json"
    registry.auth.load_configs(container, configs=[str(theirs)] if theirs.is_absolute() and theirs.is_file() else None)
    if basic and not hasattr(registry.auth, "_basic_auth"):
        raise StoreError(f"oci:{host}: wants credentials; docker login {host}")
    return registry


def _credentials(registry: "Registry") -> dict[str, str]:
    """The header that the registry has taken, or takes; empty before it was asked, and where it wants none."""
    known = getattr(registry.auth, "token", None) or hasattr(registry.auth, "_basic_auth")
    return registry.auth.get_auth_header() if known else {}


def _manifest(files: Sequence[FileEntry]) -> bytes:
    """The same files give the same bytes, so what was published already is known by them."""
    layers = [
        {
            "mediaType": "application/octet-stream",
            "digest": f"sha256:{file.sha256}",
            "size": file.size,
            "annotations": {"org.opencontainers.image.title": file.path},
        }
        for file in files
    ]
    config = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": _digest(_EMPTY), "size": len(_EMPTY)}
    document = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "artifactType": _ARTIFACT,
        "config": config,
        "layers": layers,
    }
    return json.dumps(document, indent=1).encode()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
