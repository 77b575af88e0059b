"""Turn what pydantic found in a YAML file into messages a person can act on.

Each message says where (file and line, or the override), the key path, what was given and what would be right.
The allowed keys and values are read off the type annotations, so they can't fall behind the schema.
"""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Path = tuple[str | int, ...]
Where = Mapping[Path, str]
"""Where each key path was written: `recipe.yaml:12` or `override stages.0.lr=1`."""


def dotted(path: Iterable[str | int]) -> str:
    """`("stages", 0, "lr")` -> `stages.0.lr`, the form that overrides take too."""
    return ".".join(map(str, path))


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean KEY?)` or nothing."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def locate(path: Path, where: Where, *, default: str) -> str:
    """The place of the longest prefix of `path` that was written somewhere."""
    for end in range(len(path), -1, -1):
        if path[:end] in where:
            return where[path[:end]]
    return default


# --- annotations --------------------------------------------------------------------------------


def _strip(annotation: Any) -> tuple[Any, list[Any]]:
    """An annotation without `Annotated`, and the metadata that came off."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += more
    return annotation, metadata


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, unions flattened."""
    bare, metadata = _strip(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return [alternative for member in get_args(bare) for alternative in _members(member)]
    return [Annotated[bare, *metadata] if metadata else bare]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [bare for bare in (_strip(member)[0] for member in _members(annotation)) if _is_model(bare)]


def _field(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields[name]
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _pick(models: Sequence[type[BaseModel]], value: Any) -> type[BaseModel] | None:
    """Among alternatives told apart by `kind`, the one that `value` means."""
    if len(models) == 1:
        return models[0]
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return next((m for m in models if kind in get_args(_strip(m.model_fields["kind"].annotation)[0])), None)


def annotation_at(root: type[BaseModel], data: Any, path: Path) -> Any:
    """The annotation of the key at `path`, or None where the schema has no such key."""
    annotation: Any = root
    for step in path:
        member = None
        for candidate in (_strip(m)[0] for m in _members(annotation)):
            origin, arguments = get_origin(candidate), get_args(candidate)
            if origin in (list, tuple) and isinstance(step, int):
                member = arguments[0]
            elif origin is dict:
                member = arguments[1]
        model = _pick(models, data) if (models := _models(annotation)) else None
        if model is not None and step in model.model_fields:
            member = _field(model, str(step))
        if member is None:
            return None
        annotation = member
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            data = None
    return annotation


def _flat(metadata: Iterable[Any]) -> list[Any]:
    """Constraints, those inside a `Field(...)` included."""
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: Sequence[Any]) -> str:
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    found = [
        f"{word} {bound}"
        for item in _flat(metadata)
        for name, word in words.items()
        if (bound := getattr(item, name, None)) is not None
    ]
    return " " + " and ".join(found) if found else ""


def expected(annotation: Any) -> str:
    """What may stand at an annotation, in words: `a number above 0, or a mapping of ...`."""
    said: list[str] = []
    models = _models(annotation)
    for member in _members(annotation):
        bare, metadata = _strip(member)
        origin, arguments = get_origin(bare), get_args(bare)
        if bare is type(None):
            continue
        if origin is Literal:
            said.append(("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments)))
        elif bare is bool:
            said.append("true or false")
        elif bare is int:
            said.append("a whole number" + _bounds(metadata))
        elif bare is float:
            said.append("a number" + _bounds(metadata))
        elif bare is str:
            patterns = [p for item in _flat(metadata) if (p := getattr(item, "pattern", None))]
            said.append(f"text of the form {patterns[0]}" if patterns else "text")
        elif origin is tuple and len(arguments) > 1 and arguments[1] is not Ellipsis:
            said.append(f"a list of {len(arguments)} items, each {expected(arguments[0])}")
        elif origin in (list, tuple):
            said.append(f"a list, each item {expected(arguments[0])}")
        elif origin is dict:
            said.append(f"a mapping from {expected(arguments[0])} to {expected(arguments[1])}")
        elif bare is dict:
            said.append("a mapping")
        elif _is_model(bare) and len(models) == 1:
            said.append("a mapping with the keys " + ", ".join(bare.model_fields))
        elif _is_model(bare) and bare is models[0]:
            kinds = [str(k) for m in models for k in get_args(_strip(m.model_fields["kind"].annotation)[0])]
            said.append("a mapping whose kind is one of " + ", ".join(kinds))
    if any(_strip(m)[0] is type(None) for m in _members(annotation)):
        said.append("null")
    return ", or ".join(said)


# --- errors -------------------------------------------------------------------------------------


def given(value: Any) -> str:
    """A value as its writer would recognise it."""
    if isinstance(value, Mapping):
        return "a mapping with the keys " + (", ".join(map(str, value)) or "(none)")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the text {value!r}" if isinstance(value, str) else repr(value)


def _real_path(loc: Path, data: Any) -> Path:
    """pydantic's location without the names of union members it puts in between."""
    path: list[str | int] = []
    for number, step in enumerate(loc):
        inside = isinstance(data, list) and isinstance(step, int) and step < len(data)
        if inside or (isinstance(data, Mapping) and step in data):
            data = data[step]
        elif isinstance(data, Mapping) and number == len(loc) - 1:
            data = None  # the key that is missing
        else:
            continue
        path.append(step)
    return tuple(path)


def _at(data: Any, path: Path) -> Any:
    for step in path:
        data = data[step]
    return data


def _message(root: type[BaseModel], data: Any, error: Mapping[str, Any]) -> tuple[Path, str]:
    kind, loc = error["type"], tuple(error["loc"])
    if loc and loc[-1] == "[key]":
        path = _real_path(loc[:-1], data)
        allowed = [str(a) for m in _members(annotation_at(root, data, path[:-1])) for a in _keys(m)]
        hint = did_you_mean(str(path[-1]), allowed)
        return path, f"unknown key {path[-1]}{hint}; allowed: {', '.join(allowed)}"
    path = _real_path(loc, data)
    if kind == "extra_forbidden":
        model = _pick(_models(annotation_at(root, data, path[:-1])), _at(data, path[:-1]))
        allowed = list(model.model_fields) if model else []
        return path, f"unknown key {path[-1]}{did_you_mean(str(path[-1]), allowed)}; allowed: {', '.join(allowed)}"
    annotation = annotation_at(root, data, path)
    if kind == "missing":
        return path, f"is missing; it takes {expected(annotation)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        value = _at(data, path)
        tag = value.get("kind") if isinstance(value, Mapping) else value
        kinds = [str(k) for m in _models(annotation) for k in get_args(_strip(m.model_fields["kind"].annotation)[0])]
        if not isinstance(value, Mapping):
            return path, f"is {given(value)}; right would be {expected(annotation)}"
        problem = "has no kind" if tag is None else f"has the unknown kind {tag}{did_you_mean(str(tag), kinds)}"
        return path, f"{problem}; allowed: {', '.join(kinds)}"
    if kind == "value_error":
        return path, str(error["ctx"]["error"])
    if kind == "too_short":
        return path, f"needs at least {error['ctx']['min_length']} item(s); right would be {expected(annotation)}"
    value = error["input"]
    bare = [_strip(member)[0] for member in _members(annotation)]
    literals = [str(allowed) for one in bare if get_origin(one) is Literal for allowed in get_args(one)]
    hint = did_you_mean(value, literals) if isinstance(value, str) else ""
    return path, f"is {given(value)}{hint}; right would be {expected(annotation)}"


def _keys(annotation: Any) -> tuple[Any, ...]:
    """The keys that a `dict[Literal[...], ...]` allows."""
    bare, _ = _strip(annotation)
    return get_args(get_args(bare)[0]) if get_origin(bare) is dict else ()


def explain(error: ValidationError, *, root: type[BaseModel], data: Any, where: Where, file: str) -> list[str]:
    """Every problem of a validation, one line each; one problem a key path.

    data: what was validated, as plain Python values.
    """
    problems: dict[Path, str] = {}
    places: dict[Path, str] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "default_factory_not_called":  # follows from another problem
            continue
        path, message = _message(root, data, item)
        if path in problems:
            continue
        problems[path] = message
        places[path] = locate(path, where, default=file)
        if item["type"] == "value_error":
            # values that don't fit together: an override among them is what the writer wants to hear of
            inside = [place for key, place in where.items() if key[: len(path)] == path]
            places[path] = next((place for place in inside if place.startswith("override ")), places[path])
    lines = []
    for path, message in problems.items():
        name = dotted(path[:-1] if message.startswith("unknown key") else path)
        lines.append(f"{places[path]}: {name + ': ' if name else ''}{message}")
    return lines
