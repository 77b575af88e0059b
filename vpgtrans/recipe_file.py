"""A YAML file as plain values that know where each was written, and overrides on top of it."""

import datetime
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from vpgtrans.errors import RecipeError

Key = tuple[str | int, ...]


@dataclass
class Document:
    """What a file says, and for each key path the place it was written."""

    file: str
    data: dict[str, Any]
    where: dict[Key, str] = field(default_factory=dict)


def parser(*, typ: str = "rt") -> YAML:
    """The YAML reader and writer that every recipe goes through (YAML 1.2, duplicate keys are errors)."""
    yaml = YAML(typ=typ, pure=True)
    yaml.allow_duplicate_keys = False
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keep the schema's order
    yaml.width = 120
    if typ == "safe":
        yaml.Representer = _Representer
    return yaml


class _Representer(SafeRepresenter):
    """Line breaks of old YAML inside a text, which a plain or single-quoted scalar would lose, are escaped."""

    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if set(data) & set("\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def read(path: Path) -> Document:
    """Parse a file.

    Raises:
        RecipeError: no such file, no text, no YAML, a duplicate key, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise RecipeError(f"{path}: no such recipe file{hint}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; a recipe is a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: can't be read as text: {error}") from None
    try:
        tree = parser().load(text)
    except DuplicateKeyError as error:
        found = re.search(r'duplicate key "(.*?)"', str(error.problem))
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{path}:{line}: the key {found[1] if found else ''} stands twice; keep one") from None
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, Mapping):
        what = "is empty" if tree is None else f"holds a {'list' if isinstance(tree, list) else 'single value'}"
        raise RecipeError(f"{path}: {what}; a recipe is a mapping with the keys name, source, target, data, stages, …")
    document = Document(str(path), plain(tree))
    _mark(tree, (), document)
    return document


def plain(value: Any) -> Any:
    """A YAML value as dict, list, str, int, float, bool or None, keys as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    return bool(value) if type(value).__name__ == "ScalarBoolean" else str(value)


def _mark(tree: Any, path: Key, document: Document) -> None:
    """Note the line of every key and item."""
    if isinstance(tree, CommentedMap):
        for key, value in tree.items():
            child = (*path, str(key))
            try:
                document.where[child] = f"{document.file}:{tree.lc.key(key)[0] + 1}"
            except (KeyError, TypeError):  # merged in from an anchor: the line of the mapping stands for it
                document.where[child] = document.where.get(path, document.file)
            _mark(value, child, document)
    elif isinstance(tree, CommentedSeq):
        for number, value in enumerate(tree):
            child = (*path, number)
            document.where[child] = f"{document.file}:{tree.lc.item(number)[0] + 1}"
            _mark(value, child, document)


# --- overrides ----------------------------------------------------------------------------------


def override(document: Document, overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Write overrides into a document and return what is wrong with them, a line each.

    Whether the resulting keys and values are allowed is for validation to say: here are only the paths.
    """
    problems: list[str] = []
    if isinstance(overrides, Mapping):
        items = [(str(key), value, f"override {key}={value}") for key, value in overrides.items()]
    else:
        items = _split(overrides, problems)
    for key, value, label in items:
        try:
            _set(document, key, plain(value), label)
        except ValueError as error:
            problems.append(f"{label}: {error}")
    return problems


def _split(overrides: Sequence[str], problems: list[str]) -> list[tuple[str, Any, str]]:
    """Key, value and label of each `KEY=VALUE`; what is no such thing goes to `problems`."""
    found = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"override {text}: is not KEY=VALUE, as in stages.0.lr=1e-3")
            continue
        try:
            found.append((key.strip(), parser().load(value) if value.strip() else "", f"override {text}"))
        except (YAMLError, ValueError):
            problems.append(f"override {text}: the value is not valid YAML; quote text that holds : {{ [ or #")
    return found


def _set(document: Document, key: str, value: Any, label: str) -> None:
    steps = re.sub(r"\[(\w+)\]", r".\1", key).split(".")
    if not all(steps):
        raise ValueError("the key has an empty part; it takes the form a.b.c")
    holder: Any = document.data
    path: Key = ()
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(holder, list):
            place: str | int = _index(holder, step, path)
        elif isinstance(holder, dict):
            place = step
        else:
            raise ValueError(f"{'.'.join(map(str, path))} is {holder!r}, which has no key {step} inside")
        path = (*path, place)
        if last:
            holder[place] = value
            for written in [p for p in document.where if p[: len(path)] == path]:
                del document.where[written]
            document.where[path] = label
        else:
            if isinstance(holder, dict) and holder.get(step) is None:
                holder[step] = {}
                document.where[path] = label
            holder = holder[place]
            # `initialiser: auto` is short for `initialiser: {kind: auto}`
            if path == ("initialiser",) and isinstance(holder, str):
                holder = document.data["initialiser"] = {"kind": holder}


def _index(items: list[Any], step: str, path: Key) -> int:
    """A place in a list: by number, or by the item's `name`."""
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if step.isdigit() and int(step) < len(items):
        return int(step)
    matches = [n for n, item in enumerate(items) if isinstance(item, dict) and item.get("name") == step]
    if matches:
        return matches[0]
    known = [str(name) for name in names if name]
    close = difflib.get_close_matches(step, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    allowed = ", ".join([*known, f"0 to {len(items) - 1}" if items else "none: the list is empty"])
    raise ValueError(f"{'.'.join(map(str, path))} has no item {step}{hint}; allowed: {allowed}")
