"""Read indexes of checkpoints: which there are, what they hold, and where one looks first.

An index is a file `checkpoints_registry.yaml` of the form `entry.Index`, at a path or a URL. `$VPGTRANS_REGISTRY` names
any number of them, separated by blanks (one whose path holds blanks in quotes, as in a shell). After these come the one
in the working directory and the package's own. The first index that has an id has all of its versions, so that no other
can put a newer one under a known name.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from vpgtrans.errors import RegistryError, StoreError
from vpgtrans.files import appearing
from vpgtrans.references import cache_dir
from vpgtrans.registry.entry import FORMAT_VERSION, Entry, Index, entry_keys
from vpgtrans.registry.strict_yaml import MAX_BYTES, Where, parse

log = logging.getLogger(__name__)

FILE_NAME = "checkpoints_registry.yaml"
PLACES = "VPGTRANS_REGISTRY"
"""The environment's variable that names indexes."""
_URL = re.compile(r"[a-z][a-z0-9+]*://")
_CREDENTIALS = re.compile(r"[a-z][a-z0-9+]*://[^/?#]*@")
_SHOWN = 8
"""Findings and names of a message; a damaged index may have thousands."""


@dataclass(frozen=True)
class Registry:
    """The entries of one index."""

    place: str
    """Its path, or its URL."""
    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def versions(self, id: str) -> list[Entry]:
        """All versions of an id, the newest last."""
        return sorted((entry for entry in self.entries if entry.id == id), key=lambda entry: entry.order)

    def entry(self, name: str) -> Entry:
        """The entry `ID` (its newest version that wasn't yanked) or `ID@VERSION`.

        Raises:
            RegistryError: there is none, with a did-you-mean; or every version was yanked.
        """
        id, _, version = name.partition("@")
        versions, where = self.versions(id), shown(self.place)
        if not versions:
            raise RegistryError(_unknown(id, [self]))
        if version:
            for entry in versions:
                if entry.version == version:
                    return entry
            known = ", ".join(entry.version for entry in versions[-_SHOWN:])
            raise RegistryError(f"{where}: {id} has no version {version[:40]!r}; it has: {known}")
        active = [entry for entry in versions if entry.status == "active"]
        if not active:
            newest = versions[-1]
            raise RegistryError(
                f"{where}: every version of {id} was yanked, {newest.version} because: {newest.reason}; "
                f"{newest.name} still names it"
            )
        return active[-1]


class Found(NamedTuple):
    """An entry, and the index that says so."""

    entry: Entry
    place: str


# --- where indexes are --------------------------------------------------------------------------


def places() -> list[str]:
    """Paths and URLs of all indexes that are configured or at hand, in the order they are looked into.

    Raises:
        RegistryError: `$VPGTRANS_REGISTRY` can't be read as a list.
    """
    try:
        stated = shlex.split(os.environ.get(PLACES, ""))
    except ValueError as error:
        raise RegistryError(f"${PLACES}: {error}; write paths and URLs with blanks between them") from None
    package = Path(__file__).resolve().parents[1]
    # beside the package in a checkout; inside it in a wheel
    at_hand = [Path.cwd() / FILE_NAME, package.parent / FILE_NAME, package / "share" / FILE_NAME]
    found: dict[str, str] = {}
    for place in [*stated, *(str(path) for path in at_hand if path.is_file())]:
        found.setdefault(place if is_url(place) else str(_file(place).resolve()), place)
    return list(found.values())


def is_url(place: str) -> bool:
    """Whether an index is at a URL; else it is a path."""
    return _URL.match(place) is not None


def shown(place: str) -> str:
    """A place as a message may have it: the query of a URL often holds a signature."""
    return place.partition("?")[0] if is_url(place) else place


def _file(place: str) -> Path:
    path = Path(place).expanduser()
    return path / FILE_NAME if path.is_dir() else path


# --- reading ------------------------------------------------------------------------------------


def load_index(place: str | None = None) -> Registry:
    """Read and check one index: a file, a directory that holds one of the usual name, or a URL.

    place: the first of `places()` if None.

    Raises:
        RegistryError: it isn't there, or names the line, entry and key of what is wrong.
        StoreError: a URL can't be read, and never was.
    """
    if place is None:
        found = places()
        if not found:
            raise RegistryError(f"no index of checkpoints: ${PLACES} is unset, and {Path.cwd()} has no {FILE_NAME}")
        place = found[0]
    if not is_url(place):
        place = str(_file(place))
    return Registry(place, parse_index(_read(place), place=shown(place)))


def registries() -> Iterator[Registry]:
    """Every index of `places()`, each read when it is asked for. Errors as of `load_index`."""
    return (load_index(place) for place in places())


def find(name: str, *, index: str | None = None) -> Found:
    """The entry `ID[@VERSION]`, or `registry:` before it, of one index, or of the first of all that has the id.

    Raises:
        RegistryError: none has it, or every version was yanked. As `load_index`.
    """
    name = name.removeprefix("registry:")
    id = name.partition("@")[0]
    tried = []
    for registry in registries() if index is None else [load_index(index)]:
        if registry.versions(id):
            return Found(registry.entry(name), registry.place)
        tried.append(registry)
    raise RegistryError(_unknown(id, tried))


def choose(
    entries: Iterable[Entry],
    *,
    kind: str | None = None,
    encoder: str | None = None,
    base: str | None = None,
    status: str | None = None,
) -> list[Entry]:
    """Those that are of a kind and status, and whose encoder and LLM hold a word, whatever its case."""

    def hold(word: str | None, *texts: str | None) -> bool:
        return word is None or any(word.casefold() in text.casefold() for text in texts if text is not None)

    return [
        entry
        for entry in entries
        if kind in (None, entry.kind)
        and status in (None, entry.status)
        and hold(base, entry.base.llm.reference, entry.base.llm.architecture)
        and hold(encoder, *((entry.base.encoder.kind, entry.base.encoder.reference) if entry.base.encoder else ()))
    ]


def _unknown(id: str, tried: list[Registry]) -> str:
    """What to say of an id that no index has."""
    where = ", ".join(shown(registry.place) for registry in tried) or f"no index (${PLACES} is unset)"
    known = sorted({entry.id for registry in tried for entry in registry})
    near = difflib.get_close_matches(id, known, n=1)
    offer = ", ".join(known[:_SHOWN]) + (", …" if len(known) > _SHOWN else "")
    hint = f"did you mean {near[0]}?" if near else f"it has: {offer or 'no entries'}"
    return f"{where} has no entry {id[:96]!r}; {hint}"


def _read(place: str) -> bytes:
    if is_url(place):
        return _read_url(place)
    try:
        # a pipe or a device would never end
        if not Path(place).is_file():
            raise RegistryError(
                f"{place}: no such index file (several in ${PLACES} have blanks between them; one with blanks in its "
                "path stands in quotes)"
            )
        with Path(place).open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise RegistryError(f"{place}: can't be read: {error}") from None


def _read_url(url: str) -> bytes:
    """An index at a URL; where it can't be reached, as it was when it last could."""
    from vpgtrans.registry.stores import read_small

    if _CREDENTIALS.match(url):
        raise RegistryError("an index's URL carries credentials; they come from the environment")
    kept = cache_dir() / "indexes" / f"{hashlib.sha256(url.encode()).hexdigest()}.yaml"
    try:
        data = read_small(url, MAX_BYTES)
    except StoreError as error:
        if not kept.is_file():
            raise
        log.warning("%s; taking what the index said when it was last read", error)
        return kept.read_bytes()
    parse_index(data, place=shown(url))  # what is kept was right once
    kept.parent.mkdir(parents=True, exist_ok=True)
    with appearing(kept) as temporary:
        temporary.write_bytes(data)
    return data


def parse_index(data: bytes, *, place: str) -> tuple[Entry, ...]:
    """The entries of an index's text.

    Raises:
        RegistryError: naming line, entry and key.
    """
    document = parse(data, place=place)
    version = document.get("format_version") if isinstance(document, dict) else None
    if document is None or (isinstance(document, dict) and version != FORMAT_VERSION):
        stated = "without format_version" if version is None else f"of format_version {str(version)[:40]!r}"
        newer = isinstance(version, int) and version > FORMAT_VERSION
        hint = "a newer one reads it" if newer else "which stands before `entries:`"
        raise RegistryError(f"{place}: an index {stated}; this vpgtrans reads format_version: {FORMAT_VERSION}, {hint}")
    try:
        # as JSON, where pydantic takes a list for a tuple and yet no text for a number
        entries = Index.model_validate_json(json.dumps(document), strict=True).entries or ()
    except ValidationError as error:
        lines: dict[Where, int] = {}
        parse(data, place=place, visit=lines.__setitem__)
        raise RegistryError(_explain(error, document, place=place, lines=lines)) from None
    seen: dict[tuple[str, tuple[int, ...]], Entry] = {}
    for entry in entries:
        other = seen.setdefault((entry.id, entry.order), entry)
        if other is not entry:
            same = "twice" if other.version == entry.version else f"also as {other.version}"
            raise RegistryError(f"{place}: {entry.id} has version {entry.version} {same}")
    return entries


def _explain(error: ValidationError, document: Any, *, place: str, lines: dict[Where, int]) -> str:
    """pydantic's findings, each with its line and the entry's id in place of its number."""
    clauses = []
    findings = error.errors(include_url=False, include_context=False, include_input=False)
    for finding in findings[:_SHOWN]:
        path = finding["loc"]
        line = next(lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in lines)
        steps = [str(step) for step in path]
        if len(path) > 1 and path[0] == "entries" and isinstance(path[1], int):
            entry = document["entries"][path[1]]
            id = entry.get("id") if isinstance(entry, dict) else None
            steps[:2] = [id[:96] if isinstance(id, str) and id else f"entry {path[1] + 1}"]
        said = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "missing":
            said = "is missing"
        elif finding["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(path[-1]), entry_keys(), n=1)
            said = f"is no key of an index; did you mean {near[0]}?" if near else "is no key of an index"
        elif finding["type"] == "string_type":
            said += ", in quotes where it looks like a number"
        clauses.append(f"{place}:{line}: {'.'.join(steps) or 'the document'}: {said}")
    if len(findings) > _SHOWN:
        clauses.append(f"and {len(findings) - _SHOWN} more")
    return "; ".join(clauses)
