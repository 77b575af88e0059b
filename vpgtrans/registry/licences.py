"""Which licences are known without asking, and which somebody must state.

A licence is known where the thing itself says so: a distribution's metadata, a GGUF file's header, the front matter of
a model's card, a registry's entry. Nothing is looked up in a network, and none is guessed.
"""

import importlib.metadata
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from vpgtrans.errors import ReferenceError_, RegistryError
from vpgtrans.references import resolve
from vpgtrans.registry.entry import BaseLicence, DataUse, Licence
from vpgtrans.registry.index import find

NOT_KNOWN = "NOASSERTION"
"""SPDX's word for it."""
_CARRIED = {
    "openmoji": {
        "OpenMoji 17": "CC-BY-SA-4.0",
        "English names of the distribution emoji (Unicode CLDR)": "BSD-3-Clause AND Unicode-3.0",
    }
}
"""What the data sets that come with vpgtrans are made of."""
_CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}
"""Those that name one licence; others leave its version open."""


def spdx(text: str) -> str:
    """A licence expression as SPDX writes it. Raises RegistryError where it is none."""
    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        raise RegistryError(
            f"{text[:80]!r} is no SPDX licence expression; right would be one such as Apache-2.0, CC-BY-SA-4.0 or "
            "'MIT AND CC-BY-4.0', or LicenseRef-NAME for terms that SPDX has no name for"
        ) from None


def licence_of(reference: str) -> str | None:
    """The licence of a model or VPG as far as it says so itself; None where it doesn't, or isn't here."""
    scheme, _, rest = reference.partition(":")
    if scheme == "registry":
        return _entrys(rest)
    if scheme == "pip" and (found := _distributions(rest.partition("/")[0])):
        return found
    try:
        resolved = resolve(reference, weights=False)
    except ReferenceError_:
        return None
    if resolved.kind == "gguf":
        return _named(_ggufs(resolved.path))
    return _cards(resolved.path) if resolved.path.is_dir() else None


def terms(
    manifest: Mapping[str, Any], settings: Mapping[str, Any], stated: Sequence[str]
) -> tuple[Licence, tuple[DataUse, ...]]:
    """The licence of what is published and of what it stands on, and the data that it was trained on.

    Args:
        manifest: of the VLM directory. settings: its recipe, empty where there is none.
        stated: SPDX for the files that are published, NAME=SPDX for a base or data set by its name in the recipe.

    Raises:
        RegistryError: one of them is no licence; or it isn't stated for the files and can't be concluded, because data,
            source or base have an unknown one, or several.
    """
    own, named = _stated(stated)
    source = manifest["lineage"].get("source_vpg")
    data = _data(settings, named)
    if isinstance(source, str):
        data += tuple(use for use in _data_of_source(source) if use.name not in {mine.name for mine in data})
    references = [manifest["llm"]["reference"], manifest["parts"]["encoder"]["reference"]]
    bases = {base: named.get(base) or licence_of(base) for base in references if base}
    given = {use.name: use.licence for use in data}
    if source:
        given[source] = named.get(source) or licence_of(source)
    if unused := sorted(set(named) - set(bases) - set(given)):
        known = ", ".join(dict.fromkeys([*given, *bases])) or "nothing else"
        raise RegistryError(f"--licence {unused[0]}=…: it does not stand on {unused[0]}; it stands on: {known}")
    if own is None:
        own = _concluded(given, bases, has_data=bool(settings))
    added = tuple(BaseLicence(of=base, licence=licence or NOT_KNOWN) for base, licence in bases.items())
    return Licence(spdx=own, bases=added), data


def _concluded(given: Mapping[str, str | None], bases: Mapping[str, str | None], *, has_data: bool) -> str:
    """The one licence of all that the files were made from."""
    unknown = [name for name, licence in [*given.items(), *bases.items()] if licence is None]
    several = sorted({licence for licence in given.values() if licence is not None})
    if not has_data:
        why = "there is no recipe here that says what it was trained on"
    elif unknown:
        why = f"the licence of {', '.join(unknown)} is not known"
    elif len(several) != 1:
        why = f"what it was made from has several: {', '.join(several)}" if several else "it was made from nothing"
    else:
        return several[0]
    raise RegistryError(
        f"under which licence is it published? {why}. State it: --licence SPDX, such as --licence CC-BY-4.0; and for "
        "data and bases whose licence you know, --licence NAME=SPDX"
    )


def _stated(stated: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    own, named = None, {}
    for text in stated:
        name, equals, licence = text.rpartition("=")
        if equals:
            named[name] = spdx(licence)
        elif own is not None:
            raise RegistryError(
                f"--licence: {own} and {text}; state one for the files, and NAME=SPDX for what is in it"
            )
        else:
            own = spdx(text)
    return own, named


def _data(settings: Mapping[str, Any], named: Mapping[str, str]) -> tuple[DataUse, ...]:
    sources = (settings.get("data") or {}).get("train") or []
    names = [(str(source["dataset"]), source.get("split")) for source in sources]
    return tuple(
        DataUse(name=part, licence=licence, split=split)
        for name, split in dict.fromkeys(names)
        for part, licence in _CARRIED.get(name, {name: named.get(name)}).items()
    )


def _data_of_source(reference: str) -> tuple[DataUse, ...]:
    """What the VPG that was moved was trained on, where its registry says so."""
    scheme, _, name = reference.partition(":")
    if scheme != "registry":
        return ()
    try:
        return find(name).entry.data
    except RegistryError:
        return ()


# --- what says so itself --------------------------------------------------------------------------


def _entrys(name: str) -> str | None:
    try:
        return find(name).entry.licence.spdx
    except RegistryError:
        return None


def _distributions(name: str) -> str | None:
    try:
        metadata = importlib.metadata.metadata(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    for text in (metadata["License-Expression"], metadata["License"]):
        if found := _named(text):
            return found
    classifiers = {_CLASSIFIERS.get(text) for text in metadata.get_all("Classifier") or []} - {None}
    return classifiers.pop() if len(classifiers) == 1 else None


def _named(text: Any) -> str | None:
    """A licence by SPDX's name or the hub's, such as gemma; None where it is a text, or says nothing."""
    if not isinstance(text, str) or not re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", text := text.strip()):
        return None
    if text.lower() in ("unknown", "other", "none"):
        return None
    try:
        return spdx(text)
    except RegistryError:
        return f"LicenseRef-{text}" if re.fullmatch(r"[A-Za-z0-9.-]+", text) else None


def _cards(directory: Path) -> str | None:
    """What the front matter of a model's card says."""
    try:
        card = (directory / "README.md").read_text(encoding="utf-8")
        _, head, _ = card.split("---\n", 2) if card.startswith("---\n") else ("", "", "")
        values = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(values, dict):
        return None
    own = values.get("license")
    return _named(values.get("license_name")) if own == "other" else _named(own)


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF's value types with their sizes in bytes; 8 is a text, 9 a list."""


def _ggufs(path: Path) -> str | None:
    """`general.license` of a GGUF file, which stands before the vocabulary that makes its header slow to read."""
    try:
        with path.open("rb") as file:
            magic, _, _, count = struct.unpack("<4sIQQ", file.read(24))
            for _ in range(count if magic == b"GGUF" else 0):
                key = _gguf_text(file)
                (kind,) = struct.unpack("<I", file.read(4))
                if key == "general.license":
                    return _gguf_text(file) if kind == 8 else None
                if kind == 8:
                    _gguf_text(file)
                elif kind in _SCALARS:
                    file.seek(_SCALARS[kind], 1)
                else:
                    _skip_list(file)
    except (OSError, struct.error, UnicodeDecodeError, ValueError):
        return None
    return None


def _gguf_text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > 1 << 16:
        raise ValueError("too long for a key or a licence")
    return file.read(length).decode()


def _skip_list(file: BinaryIO) -> None:
    kind, length = struct.unpack("<IQ", file.read(12))
    if kind in _SCALARS:
        file.seek(_SCALARS[kind] * length, 1)
        return
    if kind != 8 or length > 1 << 10:
        raise ValueError("the vocabulary begins; what is general stands before it")
    for _ in range(length):
        _gguf_text(file)
