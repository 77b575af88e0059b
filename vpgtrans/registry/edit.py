"""Changes of an index: an entry added, or one yanked. Comments and everything else in the file stay as they are.

The text is changed, not written anew, and is read again before it takes the old one's place: it must say what it said
before and the change, or nothing happens. Of several processes one changes an index at a time, and whoever reads it
meanwhile sees it before the change or after it.
"""

import contextlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import yaml
from ruamel.yaml import YAML

from vpgtrans.errors import OutputError, RegistryError
from vpgtrans.files import appearing
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.index import FILE_NAME, find, is_url, parse_index, places, shown

_WAIT = 120.0
"""Seconds until a lock is given up. It is held for as long as it takes to read an index twice."""
_ENTRIES = re.compile(r"""["']?entries["']?\s*:""")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_HEAD = """\
# Checkpoints that `registry:ID[@VERSION]` names, see `vpgtrans registry --help`. Comments stay; an id with its version
# never changes its meaning.

format_version: 2
entries:
"""


def writable_index(index: str | None) -> Path:
    """The file of an index that can be changed, whether it is there or not: the one named, else the first at hand that
    is a file, else one of the usual name in the working directory.

    Raises:
        RegistryError: it is at a URL.
    """
    if index is None:
        index = next((place for place in places() if not is_url(place)), FILE_NAME)
    if is_url(index):
        raise RegistryError(f"{shown(index)}: an index at a URL can't be changed; name its file, and put that there")
    path = Path(index).expanduser()
    return (path / FILE_NAME if path.is_dir() else path).resolve()


def check_new(index: Path, entry: Entry) -> None:
    """Whether an entry can be added, without doing so. Raises RegistryError as `append`."""
    _appended(_read(index), entry, index=index)


def append(index: Path, entry: Entry) -> None:
    """Add an entry at the end of an index, which is made if it isn't there.

    Raises:
        RegistryError: its id has this version already, the index is malformed, or its entries stand in one line.
        OutputError: it can't be written, or another process doesn't let go of it.
    """
    with _alone(index):
        _write(index, _appended(_read(index), entry, index=index))


def yank(name: str, *, reason: str, index: str | None = None) -> tuple[Entry, Path]:
    """Mark an entry as one that should no longer be used, and say why; returns it as it is now, and its index.

    Args:
        name: ID@VERSION; ID alone where it has one version.
        index: the first that has it if None.

    Raises:
        RegistryError: there is no such entry, it was yanked before, or it has several versions. OutputError: as of
            `append`.
    """
    place = writable_index(find(name).place if index is None else index)
    reason = " ".join(reason.split())
    if not reason:
        raise RegistryError("a yanked entry needs a reason: what is wrong with it, and what to take in its place?")
    with _alone(place):
        text = _read(place)
        before = parse_index(text.encode(), place=str(place))
        entry = _named(before, name, index=place)
        if entry.status == "yanked":
            raise RegistryError(f"{place}: {entry.name} was yanked already: {entry.reason}")
        now = entry.model_copy(update={"status": "yanked", "reason": reason})
        changed = _yanked(text, before.index(entry), reason, name=entry.name, index=place)
        _check(changed, tuple(now if other is entry else other for other in before), index=place)
        _write(place, changed)
    return now, place


def dump(entry: Entry) -> str:
    """An entry as YAML, one item of a list; what was not recorded is left out, its status is not."""
    stream = io.StringIO()
    writer = YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.width = 1 << 20
    values = json.loads(entry.model_dump_json(exclude_defaults=True))
    writer.dump([values | {"status": entry.status}], stream)
    return stream.getvalue()


# --- the text -------------------------------------------------------------------------------------


def _appended(text: str, entry: Entry, *, index: Path) -> str:
    """An index's text with an entry more."""
    before = parse_index(text.encode(), place=str(index))
    for other in before:
        if (other.id, other.order) == (entry.id, entry.order):
            raise RegistryError(
                f"{index}: {other.name} is there already, and never changes; publish with another --version"
            )
    lines = text.splitlines(keepends=True)
    indent, line = 2, len(lines)
    if before:
        begin, end, in_one_line = _list_of(text)
        if in_one_line:
            raise RegistryError(f"{index}:{begin.line + 1}: the entries stand in one line; write them as a list")
        indent = begin.column
        line = line if end.column else end.line
    else:  # nothing there yet, or nothing but []
        line = next((number for number, found in enumerate(lines, start=1) if _ENTRIES.match(found)), 0)
        if not line:
            lines.append("entries:")
            line = len(lines)
        lines[line - 1] = re.sub(r":[^#]*?(\s*(#.*)?)$", r":\1", lines[line - 1].rstrip("\r\n"))
    if not lines[line - 1].endswith("\n"):
        lines[line - 1] += "\n"
    newline = "\r\n" if "\r\n" in text else "\n"
    item = "".join(f"{' ' * indent}{found[2:]}{newline}" for found in dump(entry).splitlines())
    changed = "".join([*lines[:line], item, *lines[line:]])
    _check(changed, (*before, entry), index=index)
    return changed


def _yanked(text: str, number: int, reason: str, *, name: str, index: Path) -> str:
    """An index's text with an entry's status and reason."""
    root = yaml.compose(text, Loader=_LOADER)
    assert isinstance(root, yaml.MappingNode)
    entries = next(value for key, value in root.value if key.value == "entries")
    node = entries.value[number]
    if node.flow_style or entries.flow_style:
        raise RegistryError(f"{index}:{node.start_mark.line + 1}: {name} stands in one line; write it key by key")
    values = {key.value: (key, value) for key, value in node.value}
    lines = text.splitlines(keepends=True)
    newline = "\r\n" if "\r\n" in text else "\n"
    if "status" in values:
        key, value = values["status"]
        end = lines[value.end_mark.line][value.end_mark.column :]
        status = lines[value.start_mark.line][: value.start_mark.column] + "yanked" + end
        lines[value.start_mark.line : value.end_mark.line + 1] = [status]
    else:
        key, value = values["version"]
        lines.insert(value.end_mark.line + 1, f"{' ' * key.start_mark.column}status: yanked{newline}")
    last = key.start_mark.line + (0 if "status" in values else 1)
    if not lines[last].endswith("\n"):
        lines[last] += newline
    lines.insert(last + 1, f"{' ' * key.start_mark.column}reason: {json.dumps(reason, ensure_ascii=False)}{newline}")
    return "".join(lines)


def _list_of(text: str) -> tuple[yaml.Mark, yaml.Mark, bool]:
    """Where an index's list of entries begins and ends, and whether it stands in brackets."""
    depth, named, begin = 0, False, None
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
            if named and depth == 2:
                begin = event
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
            if begin is not None and depth == 1:
                return begin.start_mark, event.end_mark, bool(begin.flow_style)
        elif isinstance(event, yaml.ScalarEvent) and depth == 1:
            named = event.value == "entries"
    raise AssertionError("an index that has entries has a list of them")


def _check(changed: str, wanted: tuple[Entry, ...], *, index: Path) -> None:
    """Refuse a change of the text that says anything else than it should."""
    if parse_index(changed.encode(), place=str(index)) != wanted:
        raise RegistryError(f"{index} is written in a way that can't be changed without changing what it says; nothing "
                            "was written. Write its entries as a list, key by key")  # fmt: skip


def _named(entries: tuple[Entry, ...], name: str, *, index: Path) -> Entry:
    id, _, version = name.partition("@")
    versions = [entry for entry in entries if entry.id == id and version in ("", entry.version)]
    if not versions:
        known = ", ".join(entry.name for entry in entries if entry.id == id) or "no version of it"
        raise RegistryError(f"{index} has no entry {name[:160]!r}; it has: {known}")
    if len(versions) > 1:
        raise RegistryError(f"{index}: which version? {', '.join(entry.name for entry in versions)}")
    return versions[0]


# --- the file -------------------------------------------------------------------------------------


def _read(index: Path) -> str:
    if not index.exists():
        return _HEAD
    if not index.is_file():
        raise RegistryError(f"{index} is no file")
    try:
        return index.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryError(f"{index}: can't be read: {error}") from error


def _write(index: Path, text: str) -> None:
    try:
        with appearing(index) as temporary:
            temporary.write_bytes(text.encode())
            if index.exists():
                shutil.copymode(index, temporary)
    except OSError as error:
        raise OutputError(f"{index}: can't be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _alone(index: Path) -> Iterator[None]:
    """Within the block no other process changes the index; one that dies lets go of it."""
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(index.with_name(f".{index.name}.lock"), timeout=_WAIT):
            yield
    except filelock.Timeout as error:
        raise OutputError(f"{index}: another process has not let go of it for {_WAIT:.0f} s") from error
    except OSError as error:
        raise OutputError(f"{index}: can't be written: {os.strerror(error.errno) if error.errno else error}") from error
