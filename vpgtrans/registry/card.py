"""An entry's card, where it lies on this machine: nothing is fetched, and its hash is compared before it is shown."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vpgtrans.errors import IntegrityError
from vpgtrans.registry.below import open_file
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.index import is_url
from vpgtrans.registry.pull import at_hand

CARD = "README.md"
_MOST = 1 << 20
_SHOWN = 30_000
"""Characters; brackets that nobody closes take a renderer seconds beyond."""
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def read_card(entry: Entry, *, index: str) -> str | None:
    """The text of an entry's card without the hub's front matter; None where it isn't at hand, or was altered."""
    file = next((file for file in entry.files if file.path == CARD and file.size <= _MOST), None)
    if file is None:
        return None
    for directory in _places(entry, index):
        try:
            with os.fdopen(open_file(directory, CARD), "rb") as stream:
                data = stream.read(file.size + 1)
        except (OSError, IntegrityError):
            continue
        if hashlib.sha256(data).hexdigest() == file.sha256:
            text = data.decode("utf-8", errors="replace")
            text = _FRONT_MATTER.sub("", text, count=1)
            return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}\n\n…\n"
    return None


def _places(entry: Entry, index: str) -> Iterator[Path]:
    """Directories that may hold an entry's files: where a local index says, then the cache."""
    if not is_url(index):
        home = Path(index).resolve().parent
        yield from (home / location for location in entry.locations if ":" not in location)
    if (pulled := at_hand(entry)) is not None:
        yield pulled
