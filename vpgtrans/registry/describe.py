"""An entry of a registry from a VLM directory, or from one part of one: what its manifest and files say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vpgtrans import __version__
from vpgtrans.errors import ReferenceError_, RegistryError
from vpgtrans.references import digest, resolve
from vpgtrans.registry.entry import (
    DataUse,
    Entry,
    FileEntry,
    Licence,
    Lineage,
    LLMBase,
    Metric,
    Parent,
)
from vpgtrans.registry.index import find

MANIFEST = "manifest.json"


def describe(
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    id: str,
    version: str,
    locations: tuple[str, ...],
    description: str,
    licence: Licence,
    data: tuple[DataUse, ...] = (),
    metrics: tuple[Metric, ...] = (),
    code_version: str = __version__,
) -> Entry:
    """The entry of what lies in a directory: files from the disk, the rest from its manifest.

    Raises:
        RegistryError: the manifest lacks what an entry needs, or something can't stand in one.
    """
    try:
        parts, llm, encoder = manifest["parts"], manifest["llm"], manifest["parts"]["encoder"]
        projector = parts.get("projector") or {}
        return Entry.model_validate({
            "id": id,
            "version": version,
            "kind": manifest.get("kind", "vlm"),
            "description": description,
            "locations": locations,
            "files": describe_files(directory),
            "base": {
                "llm": {key: llm[key] for key in LLMBase.model_fields if key in llm},
                "encoder": {
                    "kind": encoder["kind"],
                    "reference": encoder["reference"],
                    "weights_sha256": encoder["weights_sha256"],
                    "width": encoder["width"],
                    "patches": encoder["patches"],
                },
            },
            "interface": {
                "visual_tokens": manifest["visual_tokens"],
                "width": parts["connector"]["width"],
                "projected": projector.get("width_out"),
                "image_size": encoder["image_size"],
                "prompt": manifest["prompt"]["template"],
            },
            "licence": licence,
            "data": data,
            "metrics": metrics,
            "lineage": lineage_of(manifest, code_version=code_version),
        })  # fmt: skip
    except KeyError as error:
        raise RegistryError(f"{directory / MANIFEST} says nothing about {error.args[0]!r}") from error
    except ValidationError as error:
        raise RegistryError(f"{directory}: {explained(error)}") from error


def explained(error: ValidationError) -> str:
    """pydantic's findings, one a clause."""
    findings = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(f"{'.'.join(map(str, found['loc'])) or 'the entry'}: {found['msg']}" for found in findings[:8])


def describe_files(directory: Path) -> tuple[FileEntry, ...]:
    """Every file below a directory with size and sha256, sorted by path.

    Raises:
        RegistryError: there is a link, a name that an entry can't hold, or no file at all.
    """
    files = []
    for file in sorted(directory.rglob("*")):
        if file.is_symlink():
            raise RegistryError(f"{file} is a link; an entry holds plain files only")
        if file.is_file():
            path = file.relative_to(directory).as_posix()
            try:
                files.append(FileEntry(path=path, size=file.stat().st_size, sha256=digest(file).hex()))
            except ValidationError as error:
                raise RegistryError(f"{file}: {explained(error)}") from error
    if not files:
        raise RegistryError(f"{directory}: no files to describe")
    return tuple(files)


def lineage_of(manifest: Mapping[str, Any], *, code_version: str = __version__) -> Lineage:
    """Parents, recipe and seed, as a run wrote them into its manifest."""
    said = manifest["lineage"]
    source, llm = said.get("source_vpg"), manifest["llm"]["reference"]
    parents = [Parent(relation="source", reference=source, sha256=manifest_sha256(source))] if source else []
    parents.append(Parent(relation="target" if source else "base", reference=said.get("target_llm") or llm))
    return Lineage(
        parents=tuple(parents),
        recipe=said.get("recipe"),
        recipe_sha256=said.get("recipe_sha256"),
        initialiser=said.get("initialiser"),
        seed=said.get("seed"),
        code_version=code_version,
        forced=tuple(said.get("forced") or ()),
    )


def manifest_sha256(reference: str) -> str | None:
    """Of what a VPG's reference names, where that is at hand without a network; None of an importable model."""
    scheme, _, name = reference.partition(":")
    try:
        if scheme == "registry":
            files = find(name).entry.files
            return next((file.sha256 for file in files if file.path == MANIFEST), None)
        if scheme == "hf" or not Path(reference).expanduser().exists():
            return None
        found = resolve(reference)
    except (ReferenceError_, RegistryError):
        return None
    return digest(found.path / MANIFEST).hex() if found.kind == "vlm" else None
