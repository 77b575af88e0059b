"""What one version of a checkpoint has otherwise than another, as their indexes say; no file is read."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vpgtrans.registry.entry import Entry, FileEntry

_BY_KEY = {
    "metrics": ("data", "split", "name"),
    "data": ("name",),
    "bases": ("of",),
    "parents": ("relation", "reference"),
}
"""List -> what names an item of it, wherever it stands."""


@dataclass(frozen=True)
class Difference:
    """One thing that two entries say otherwise; None where one says nothing."""

    what: str
    a: Any
    b: Any

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diff(a: Entry, b: Entry) -> list[Difference]:
    """What differs: first the files, then the rest in the order of an entry's keys."""
    files = [{file.path: file for file in entry.files} for entry in (a, b)]
    found = [
        Difference(f"file {path}", _told(files[0].get(path)), _told(files[1].get(path)))
        for path in sorted(files[0].keys() | files[1].keys())
        if files[0].get(path) != files[1].get(path)
    ]
    said = [dict(_flat("", entry.model_dump(mode="json", exclude={"files"}))) for entry in (a, b)]
    keys = dict.fromkeys([*said[0], *said[1]])
    return found + [
        Difference(key, said[0].get(key), said[1].get(key)) for key in keys if said[0].get(key) != said[1].get(key)
    ]


def _told(file: FileEntry | None) -> str | None:
    return None if file is None else f"{file.size:,} bytes, sha256 {file.sha256[:12]}…"


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value under its dotted key; items of a list under what names them, not under their number."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(f"{key}.{name}" if key else name, item)
    elif names := _BY_KEY.get(key.rpartition(".")[2]):
        for item in value:
            named = " ".join(str(item[name]) for name in names if item[name] is not None)
            rest = {name: said for name, said in item.items() if name not in names and said is not None}
            yield from _flat(f"{key}[{named}]", rest or True)
    else:
        yield key, value
