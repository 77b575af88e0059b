"""YAML as plain data from files that nobody vouches for: no tags, no aliases, no duplicate keys, and limits on all.

The parser's events are taken one by one and become dicts, lists and scalars, so nothing is built before it is allowed.
Plain scalars mean what YAML 1.2's core schema says: true, null and numbers are no text, dates and `yes` are.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)

from vpgtrans.errors import RegistryError

MAX_BYTES = 16 << 20
"""An index of some thousand entries is a tenth of it."""
MAX_DEPTH = 16
MAX_NODES = 1_000_000

Step = str | int
Where = tuple[Step, ...]

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What would move a terminal's cursor or turn the order of what is read."""


class _Refused(ValueError):
    """What is wrong, for the one place that knows file and line."""


@dataclass
class _Level:
    """A mapping or list whose items are being read."""

    container: dict[str, Any] | list[Any]
    step: Step = -1
    """The key or number of the item that was begun last."""
    waits: bool = False
    """Whether a mapping's key still has no value."""

    def add(self, value: Any) -> None:
        """Put in a list's next item, or the value that the key waits for."""
        if isinstance(self.container, list):
            self.step = len(self.container)
            self.container.append(value)
        else:
            self.container[str(self.step)] = value
            self.waits = False


def parse(data: bytes, *, place: str, visit: Callable[[Where, int], None] | None = None) -> Any:
    """The one document in `data`; None where it is empty.

    Args:
        place: its name in messages.
        visit: called with the path of every value and the line it stands on.

    Raises:
        RegistryError: naming the line.
    """
    if len(data) > MAX_BYTES:
        raise RegistryError(f"{place}: is larger than the {MAX_BYTES >> 20} MB that an index may have")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RegistryError(f"{place}: is no UTF-8 text (byte {error.start})") from None
    line = 1
    levels: list[_Level] = []
    document: Any = None
    try:
        for number, event in enumerate(_nodes(text)):
            line = event.start_mark.line + 1
            if number > MAX_NODES:
                raise _Refused(f"more than {MAX_NODES:,} values")
            if not isinstance(event, NodeEvent):  # the end of a mapping or list
                levels.pop()
                continue
            level = levels[-1] if levels else None
            if level is not None and isinstance(level.container, dict) and not level.waits:
                level.step, level.waits = _key(event, level.container), True
                continue
            value = _value(event)
            if level is None:
                document = value
            else:
                level.add(value)
            if visit is not None:
                visit(tuple(level.step for level in levels), line)
            if isinstance(event, MappingStartEvent | SequenceStartEvent):
                levels.append(_Level(value))
                if len(levels) > MAX_DEPTH:
                    raise _Refused(f"nested deeper than {MAX_DEPTH} levels")
    except _Refused as refused:
        raise RegistryError(f"{place}:{line}: {refused}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        found = f":{mark.line + 1}" if mark else ""
        raise RegistryError(f"{place}{found}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RegistryError(f"{place}: not valid YAML: {' '.join(str(error).split())}") from None
    return document


def _nodes(text: str) -> Iterator[Event]:
    """The events of values and of the ends of mappings and lists. Raises _Refused at a second document."""
    # libyaml's parser is some fifty times as fast; an installation may lack it
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents = 0
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused(f"a second document begins in line {event.start_mark.line + 1}; a file holds one")
        elif isinstance(event, NodeEvent | yaml.MappingEndEvent | yaml.SequenceEndEvent):
            yield event


def _key(event: NodeEvent, mapping: dict[str, Any]) -> str:
    if not isinstance(event, ScalarEvent):
        _plain(event)
        raise _Refused("a key must be text")
    key = _text(event)
    if key in mapping:
        raise _Refused(f"the key {key[:80]} stands twice; keep one")
    return key


def _value(event: NodeEvent) -> Any:
    _plain(event)
    if isinstance(event, MappingStartEvent):
        return {}
    if isinstance(event, SequenceStartEvent):
        return []
    assert isinstance(event, ScalarEvent)
    text = _text(event)
    return text if event.style else _resolved(text)


def _plain(event: Any) -> None:
    """Refuse what makes one node stand for another, or for an object."""
    if isinstance(event, AliasEvent):
        raise _Refused(f"*{event.anchor[:80]} is an alias; write out what it stands for")
    if event.anchor is not None:
        raise _Refused(f"&{event.anchor[:80]} is an anchor; write out each value")
    if event.tag is not None:
        raise _Refused(f"{event.tag[:80]} is a tag; values are plain text, numbers, true, false and null")


def _text(event: ScalarEvent) -> str:
    _plain(event)
    if found := _UNSAFE.search(event.value):
        raise _Refused(f"the control character U+{ord(found[0]):04X} in a text")
    return str(event.value)


def _resolved(text: str) -> str | int | float | bool | None:
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        if len(text) > 18:
            raise _Refused(f"{text[:40]} is too large a number; text is written in quotes")
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _NOT_FINITE.fullmatch(text) or (_FLOAT.fullmatch(text) and not math.isfinite(float(text))):
        raise _Refused(f"{text[:40]} is no finite number; text is written in quotes")
    return float(text) if _FLOAT.fullmatch(text) else text
