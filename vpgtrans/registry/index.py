"""Read `checkpoints_registry.yaml` and turn an entry into a local directory whose every byte was checked.

The index is looked for at `$VPGTRANS_REGISTRY`, then in the working directory, then beside the package. An entry lists
each file with its size and sha256; locations are tried in order, and nothing is used before all files match.
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vpgtrans.errors import IntegrityError, ReferenceError_, RegistryError
from vpgtrans.references import digest, resolve

log = logging.getLogger(__name__)

FILE_NAME = "checkpoints_registry.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _safe(path: str) -> str:
    """A relative path with forward slashes that stays where it begins."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or ":" in parts[0] or {"", ".", ".."} & set(parts):
        raise ValueError(f"{path!r} must be a relative path with forward slashes, without '.' and '..'")
    return path


class FileEntry(_Part):
    """One file of an entry."""

    path: str
    """Relative to the entry's directory."""
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    _path_is_safe = field_validator("path")(_safe)


class LLMEntry(_Part):
    """The language model that a checkpoint was made with."""

    reference: str
    width: Annotated[int, Field(gt=0)]
    vocabulary: Annotated[int, Field(gt=0)]
    tokenizer_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class InterfaceEntry(_Part):
    """What a user of the checkpoint meets."""

    visual_tokens: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    """Of a visual token, before the projector."""
    image_size: Annotated[int, Field(gt=0)]
    prompt: str


class Entry(_Part):
    """One version of one checkpoint."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$")]
    version: Annotated[str, Field(pattern=r"^\d+(?:\.\d+)*$")]
    kind: Literal["vpg", "projector", "adapter", "vlm"]
    description: str
    location: Annotated[tuple[str, ...], Field(min_length=1)]
    """A path relative to the index, or hf:ORG/REPO[@REVISION]; a bare string is a list of one. Tried in order."""
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]
    llm: LLMEntry
    interface: InterfaceEntry
    licence: str
    data: str
    """What it was trained on, with the data's licence."""
    metrics: dict[str, float] = {}
    lineage: dict[str, Any] = {}
    status: Literal["available", "deprecated", "withdrawn"] = "available"

    @field_validator("location", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("location")
    @classmethod
    def _locations_are_safe(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for location in value:
            if not re.fullmatch(r"hf:[\w.-]+/[\w.-]+(@[\w./-]+)?", location):
                _safe(location)
        return value

    @model_validator(mode="after")
    def _files_are_distinct(self) -> "Entry":
        paths = [file.path for file in self.files]
        repeated = sorted({path for path in paths if paths.count(path) > 1})
        if repeated:
            raise ValueError(f"files: listed twice: {', '.join(repeated)}")
        return self


class _Document(_Part):
    entries: tuple[Entry, ...] = ()


class Registry:
    """The entries of one index file."""

    def __init__(self, path: Path, entries: tuple[Entry, ...]) -> None:
        self.path = path
        ids = [entry.id for entry in entries]
        self.entries = {
            entry.id if ids.count(entry.id) == 1 else f"{entry.id}@{entry.version}": entry for entry in entries
        }
        """Name -> entry; the name carries the version where an id has several."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, name: str) -> Entry:
        """The entry `ID` (its newest version) or `ID@VERSION`. Raises RegistryError with a did-you-mean."""
        wanted, _, version = name.partition("@")
        versions = sorted((entry for entry in self if entry.id == wanted), key=_version_key)
        if not versions:
            near = difflib.get_close_matches(wanted, sorted({entry.id for entry in self}), n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has: {self._names()}"
            raise RegistryError(f"{self.path} has no entry {wanted!r}; {hint}")
        if not version:
            return next((entry for entry in reversed(versions) if entry.status == "available"), versions[-1])
        for entry in versions:
            if entry.version == version:
                return entry
        known = ", ".join(entry.version for entry in versions)
        raise RegistryError(f"{self.path}: {wanted} has no version {version!r}; it has: {known}")

    def _names(self) -> str:
        return ", ".join(sorted({entry.id for entry in self})) or "no entries"


def _version_key(entry: Entry) -> tuple[int, ...]:
    return tuple(int(number) for number in entry.version.split("."))


# --- reading ------------------------------------------------------------------------------------


def registry_path() -> Path:
    """Where the index lies. Raises RegistryError with the places tried."""
    configured = os.environ.get("VPGTRANS_REGISTRY")
    if configured:
        path = Path(configured).expanduser()
        if not path.is_file():
            raise RegistryError(f"$VPGTRANS_REGISTRY names {path}, which is no file")
        return path
    package = Path(__file__).resolve().parents[1]
    # beside the package in a checkout; inside it in a wheel
    places = [Path.cwd() / FILE_NAME, package.parent / FILE_NAME, package / "share" / FILE_NAME]
    for place in places:
        if place.is_file():
            return place
    raise RegistryError(
        f"no registry found. Tried: $VPGTRANS_REGISTRY (unset), {', '.join(str(place) for place in places)}"
    )


def load_registry(path: Path | None = None) -> Registry:
    """Read and validate an index file; RegistryError names file, entry and key."""
    path = path or registry_path()
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RegistryError(f"{path}: can't be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise RegistryError(f"{path}: {error}") from error
    try:
        entries = _Document.model_validate(document if document is not None else {}).entries
    except ValidationError as error:
        raise RegistryError(f"{path}: {_explain(error, document)}") from error
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for entry in entries:
        key = (entry.id, _version_key(entry))
        if key in seen:
            raise RegistryError(f"{path}: {entry.id} has version {entry.version} twice")
        seen.add(key)
    return Registry(path, entries)


def _explain(error: ValidationError, document: Any) -> str:
    """pydantic's findings, one a clause, with the entry's id in place of its number."""
    clauses = []
    for finding in error.errors():
        place = [str(step) for step in finding["loc"]]
        if len(place) > 1 and place[0] == "entries" and place[1].isdigit():
            entry = document["entries"][int(place[1])]
            name = entry.get("id") if isinstance(entry, dict) else None
            place[:2] = [str(name) if name else f"entry {int(place[1]) + 1}"]
        clauses.append(f"{'.'.join(place) or 'the document'}: {finding['msg']}")
    return "; ".join(clauses)


def find_entry(name: str) -> Entry:
    """`load_registry().entry(name)`."""
    return load_registry().entry(name)


# --- getting an entry ---------------------------------------------------------------------------


def resolve_entry(name: str, *, registry: Registry | None = None) -> Path:
    """A local directory of the entry, every file's size and sha256 checked.

    Raises RegistryError for an unknown or withdrawn entry or one that no location has, IntegrityError naming the file
    that is missing or differs.
    """
    registry = registry or load_registry()
    entry = registry.entry(name)
    if entry.status == "withdrawn":
        raise RegistryError(f"{registry.path}: {entry.id}@{entry.version} is withdrawn: {entry.description}")
    if entry.status == "deprecated":
        log.warning("%s@%s is deprecated: %s", entry.id, entry.version, entry.description)
    tried = []
    for location in entry.location:
        try:
            directory = _locate(registry.path, location)
        except ReferenceError_ as error:
            tried.append(str(error))
            continue
        verify_files(directory, entry.files, name=f"{entry.id}@{entry.version}")
        return directory
    raise RegistryError(f"{registry.path}: {entry.id}@{entry.version} can't be reached. Tried: {'; '.join(tried)}")


def _locate(index: Path, location: str) -> Path:
    if location.startswith("hf:"):
        found = resolve(location)
        return found.path if found.path.is_dir() else found.path.parent
    root = index.resolve().parent
    directory = root / location
    if not directory.is_dir():
        raise ReferenceError_(f"{directory} (no such directory)")
    if not directory.resolve().is_relative_to(root):
        raise IntegrityError(f"{index}: the location {location} leads out of {root} through a link")
    for path in directory.rglob("*"):
        if path.is_symlink():
            raise IntegrityError(f"{index}: {path} is a link; an entry holds plain files only")
    return directory


def verify_files(directory: Path, files: tuple[FileEntry, ...], *, name: str) -> None:
    """Compare a directory with a list of files; IntegrityError says which file is missing, or how it differs."""
    for file in files:
        path = directory / file.path
        if not path.is_file():
            raise IntegrityError(f"{name}: {path} is missing")
        size = path.stat().st_size
        if size != file.size:
            raise IntegrityError(f"{name}: {path} has {size} bytes, the registry says {file.size}")
        actual = digest(path).hex()
        if actual != file.sha256:
            raise IntegrityError(f"{name}: {path} has sha256 {actual}, the registry says {file.sha256}")


# --- making an entry ----------------------------------------------------------------------------


def describe_directory(path: Path) -> list[FileEntry]:
    """Every file under `path` with size and sha256, sorted by path. Raises RegistryError for links and empty trees."""
    files = []
    for file in sorted(path.rglob("*")):
        if file.is_symlink():
            raise RegistryError(f"{file} is a link; an entry holds plain files only")
        if file.is_file():
            relative = str(PurePosixPath(file.relative_to(path)))
            files.append(FileEntry(path=relative, size=file.stat().st_size, sha256=digest(file).hex()))
    if not files:
        raise RegistryError(f"{path}: no files to describe")
    return files


def entry_from_vlm(
    directory: Path,
    *,
    id: str,
    version: str,
    location: str | tuple[str, ...],
    description: str,
    licence: str,
    data: str,
    kind: Literal["vpg", "projector", "adapter", "vlm"] = "vlm",
    metrics: dict[str, float] | None = None,
) -> Entry:
    """An entry for a VLM directory: llm, interface and lineage come from its manifest, files from the disk.

    Raises RegistryError where the manifest lacks one of them.
    """
    place = directory / "manifest.json"
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RegistryError(f"{place}: can't be read: {error}") from error
    try:
        values = {
            "llm": {key: manifest["llm"][key] for key in LLMEntry.model_fields},
            "interface": {
                "visual_tokens": manifest["visual_tokens"],
                "width": manifest["parts"]["connector"]["width"],
                "image_size": manifest["parts"]["encoder"]["image_size"],
                "prompt": manifest["prompt"]["template"],
            },
        }
        return Entry(
            id=id,
            version=version,
            kind=kind,
            description=description,
            location=location,  # type: ignore[arg-type]
            files=tuple(describe_directory(directory)),
            licence=licence,
            data=data,
            metrics=metrics or {},
            lineage=manifest.get("lineage") or {},
            **values,  # type: ignore[arg-type]
        )
    except KeyError as error:
        raise RegistryError(f"{place} says nothing about {error.args[0]!r}") from error
    except ValidationError as error:
        raise RegistryError(f"{directory}: {_explain(error, None)}") from error


def dump_entry(entry: Entry) -> str:
    """The entry as YAML, as one item of the index's `entries`."""
    from io import StringIO

    stream = StringIO()
    writer = YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.width = 120
    writer.dump([json.loads(entry.model_dump_json())], stream)
    return stream.getvalue()
