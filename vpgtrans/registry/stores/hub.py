"""Files in a repository of the Hugging Face hub: hf:ORG/REPO[@REVISION].

Credentials are those of `hf auth login` or $HF_TOKEN. What huggingface_hub downloaded before is read from its cache.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vpgtrans.errors import RegistryError, StoreError
from vpgtrans.registry.entry import FileEntry
from vpgtrans.registry.stores import http
from vpgtrans.registry.stores.messages import reason

if TYPE_CHECKING:
    import requests

_LOCATION = re.compile(r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_CHUNK = 1 << 20


class HubStore:
    """A repository at a revision; the newest where none is named."""

    def __init__(self, location: str) -> None:
        match = _LOCATION.fullmatch(location)
        if match is None:
            raise RegistryError(f"{location}: write hf:ORG/REPO[@REVISION]")
        self.location = location
        self.repository = match["repository"]
        self.revision = match["revision"]

    def read(self, file: FileEntry, *, start: int = 0) -> Iterator[bytes]:
        import huggingface_hub
        from huggingface_hub import constants

        here = huggingface_hub.try_to_load_from_cache(self.repository, file.path, revision=self.revision)
        if isinstance(here, str) and os.path.getsize(here) == file.size:
            with open(here, "rb") as stream:
                stream.seek(start)
                while piece := stream.read(_CHUNK):
                    yield piece
            return
        if constants.HF_HUB_OFFLINE:
            raise StoreError(f"{self.location}: {file.path} is not in the hub's cache, and $HF_HUB_OFFLINE is set")
        url = huggingface_hub.hf_hub_url(self.repository, file.path, revision=self.revision)
        # The hub keeps large files on other hosts; the token goes to its own only.
        yield from http.fetch(url, start=start, redirects="any host", authorise=_authorise)

    def write(self, directory: Path, files: Sequence[FileEntry]) -> str:
        """One commit, which is the hub's way to have all of them or none. Older versions stay under their revisions."""
        import huggingface_hub
        from huggingface_hub import CommitOperationAdd, errors

        api = huggingface_hub.HfApi(library_name="vpgtrans")
        operations = [CommitOperationAdd(file.path, str(directory / file.path)) for file in files]
        try:
            api.create_repo(self.repository, exist_ok=True)
            commit = api.create_commit(
                self.repository, operations, revision=self.revision, commit_message="Publish a checkpoint of vpgtrans"
            )
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, ValueError) as error:
            raise StoreError(f"{self.location}: {reason(error)}; hf auth login gets credentials") from error
        return f"hf:{self.repository}@{commit.oid}"


def _authorise(request: "requests.PreparedRequest") -> "requests.PreparedRequest":
    import huggingface_hub

    token = huggingface_hub.get_token()
    if token:
        request.headers["Authorization"] = f"Bearer {token}"
    return request
