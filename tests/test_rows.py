"""Records of JSON lines and JSON arrays by number: the same as `json` reads, and errors with the line."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from data_files import damaged, damages
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgtrans.data import rows as module
from vpgtrans.data.config import DataSource
from vpgtrans.data.formats import open_rows
from vpgtrans.data.rows import ArrayRows, LineRows, Rows
from vpgtrans.errors import DataError

# Much of what decides where strings and elements end.
texts = st.text(alphabet=list('ab"\\[]{},:\n\t é😀'), max_size=12) | st.text(max_size=6)
values = st.recursive(
    texts | st.none() | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
records = st.dictionaries(texts, values, max_size=3)
stretches = st.integers(1, 40)
ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"])


def read_all(rows: Rows) -> list[dict[str, Any]]:
    return [rows.read(row) for row in range(len(rows))]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- arrays -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(records, max_size=4), st.sampled_from([None, 0, 2]), st.booleans(), stretches)
def test_an_array_reads_as_json_does(tmp_path_factory, content, indent, escaped, stretch):
    file = write(tmp_path_factory.getbasetemp() / "good.json", json.dumps(content, indent=indent, ensure_ascii=escaped))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRETCH", stretch)
        rows = ArrayRows(file)
        assert read_all(rows) == content
        assert read_all(pickle.loads(pickle.dumps(rows))) == content


@settings(deadline=None, max_examples=120)
@given(st.lists(records, max_size=4), damages, stretches)
def test_a_damaged_array_is_refused_unless_json_takes_it(tmp_path_factory, content, damage, stretch):
    changed = damaged(json.dumps(content).encode(), damage)
    file = write(tmp_path_factory.getbasetemp() / "bad.json", changed)
    try:
        wanted = json.loads(changed)
    except (ValueError, RecursionError):
        wanted = None
    fine = isinstance(wanted, list) and all(isinstance(record, dict) for record in wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRETCH", stretch)
        if fine:
            assert read_all(ArrayRows(file)) == wanted
        else:
            with pytest.raises(DataError, match=r"bad\.json"):
                read_all(ArrayRows(file))


@pytest.mark.parametrize("slashes", range(8))
@pytest.mark.parametrize("stretch", [1, 2, 3, 5])
def test_backslashes_before_a_quote_across_stretches(tmp_path, monkeypatch, slashes, stretch):
    monkeypatch.setattr(module, "_STRETCH", stretch)
    content = [{"a": "\\" * slashes + '"]}'}, {"b": "\\" * slashes}]
    assert read_all(ArrayRows(write(tmp_path / "a.json", json.dumps(content)))) == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', "line 2: .*behind 2 elements"),
        ('[{"a": 1},\n null,\n{"a": 3}]', "line 1: .*behind 1 elements"),
        ('[{"a": 1},\n {"a": "x}, {"b": "y"}]', "line 2"),
        ('[{"a": 1},\n {"a": 2]},\n {"a": 3}]', "line 2"),
        ('[{"a": 1},\n\n {"a": 2', "line 3"),
        ('[{"a": 1}]\n[{"a": 2}]', "line 1: .*behind 1 elements"),
        ("[1, 2]", "right would be"),
        ("[", "line 1"),
        ('[{"a": 1},]', "line 1"),
    ],
    ids=["comma", "null", "quote", "bracket", "cut", "two", "numbers", "opening", "last-comma"],
)
def test_a_malformed_array_names_the_line(tmp_path: Path, content: str, message: str):
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        read_all(ArrayRows(write(tmp_path / "a.json", content)))


def test_a_malformed_element_costs_its_row_only(tmp_path: Path):
    rows = ArrayRows(write(tmp_path / "a.json", '[{"a": 1},\n\n {"a": oops},\n {"a": 3}, [4]]'))
    assert len(rows) == 4
    assert [rows.read(0), rows.read(2)] == [{"a": 1}, {"a": 3}]
    with pytest.raises(DataError, match=r"a\.json, element 1 \(line 3\): no valid JSON"):
        rows.read(1)
    with pytest.raises(DataError, match=r"element 3 \(line 4\): list; right would be an object"):
        rows.read(3)


def test_lines_are_counted_across_stretches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_STRETCH", 7)
    rows = ArrayRows(write(tmp_path / "a.json", "[" + ",\n".join('{"a": [1]}' for _ in range(20)) + "]"))
    assert [rows.where(row) for row in (0, 13, 19)] == [
        f"{tmp_path}/a.json, element {row} (line {row + 1})" for row in (0, 13, 19)
    ]


# --- lines --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.lists(records, min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"]),
    st.booleans(),
    stretches,
)
def test_lines_read_as_json_does(tmp_path_factory, content, end, last, stretch):
    lines = end.join(json.dumps(record, ensure_ascii=False) for record in content) + (end if last else "")
    file = write(tmp_path_factory.getbasetemp() / "good.jsonl", lines.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRETCH", stretch)
        rows = LineRows(file)
    assert read_all(rows) == content
    assert read_all(pickle.loads(pickle.dumps(rows))) == content


@settings(deadline=None, max_examples=60)
@given(st.lists(records, min_size=1, max_size=4), damages)
def test_every_damaged_line_is_a_record_or_an_error(tmp_path_factory, content, damage):
    changed = damaged("\n".join(json.dumps(record) for record in content).encode(), damage)
    file = write(tmp_path_factory.getbasetemp() / "bad.jsonl", changed or b"\n")
    rows = LineRows(file)
    lines = [line for line in changed.split(b"\n") if line.strip(b" \t\r\n\x0b\x0c")]
    assert len(rows) == len(lines)
    for row, line in enumerate(lines):
        try:
            wanted = json.loads(line)
        except (ValueError, RecursionError):
            wanted = None
        if isinstance(wanted, dict):
            assert rows.read(row) == wanted
        else:
            with pytest.raises(DataError, match=r"bad\.jsonl, line \d+: "):
                rows.read(row)


def test_a_malformed_line_is_named_as_an_editor_counts(tmp_path: Path):
    rows = LineRows(write(tmp_path / "a.jsonl", '{"a": 1}\n\n  \n{"a": \n{"a": 2}\n7\n'))
    assert len(rows) == 4
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: no valid JSON"):
        rows.read(1)
    with pytest.raises(DataError, match=r"a\.jsonl, line 6: int; right would be an object"):
        rows.read(3)
    assert rows.read(2) == {"a": 2}


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "deep"])
def test_what_python_can_not_hold_costs_its_row_only(tmp_path: Path, value: str):
    rows = LineRows(write(tmp_path / "a.jsonl", f'{{"a": {value}}}\n{{"a": 1}}'))
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: no valid JSON"):
        rows.read(0)
    assert rows.read(1) == {"a": 1}


# --- which of the two ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('[{"a": 1}]', ArrayRows),
        (' \n\n [{"a": 1}]', ArrayRows),
        ('\ufeff[{"a": 1}]', ArrayRows),
        ('{"a": 1}\n', LineRows),
        ('\ufeff{"a": 1}\n', LineRows),
    ],
)
def test_json_is_an_array_or_lines(tmp_path: Path, content: str, kind: type):
    rows = open_rows(DataSource(dataset=str(write(tmp_path / "a.json", content)))).rows
    assert isinstance(rows, kind)
    assert read_all(rows) == [{"a": 1}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_an_empty_file(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=rf"{name}: the file is empty"):
        open_rows(DataSource(dataset=str(write(tmp_path / name, ""))))
