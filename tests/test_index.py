"""Indexes: what is malformed or hostile is refused with its line, and the right entry is found among several."""

import json
import os
import time
from io import StringIO
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from indexes import values, write_index
from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vpgtrans.errors import RegistryError, StoreError
from vpgtrans.registry import entry as types
from vpgtrans.registry import index
from vpgtrans.registry.strict_yaml import MAX_BYTES, MAX_DEPTH, parse

TOP = Path(__file__).parents[1]


def refused(text: str | bytes) -> str:
    """What is said of an index's text."""
    with pytest.raises(RegistryError) as caught:
        index.parse_index(text if isinstance(text, bytes) else text.encode(), place="here.yaml")
    message = str(caught.value)
    assert message.startswith("here.yaml")
    assert len(message) < 3_000
    return message


def of(*entries: object) -> str:
    """An index's text with anything for entries."""
    return json.dumps({"format_version": 2, "entries": list(entries)}, indent=1)


# --- strict YAML ----------------------------------------------------------------------------------


def test_plain_scalars_mean_what_the_core_schema_says() -> None:
    text = b"""
    [1, -2, 0o17, 0x1f, 1.5, 1e3, .5, true, False, null, ~, , "1", 'true', yes, no, on, 2024-01-01, 1_000, 1:20, <<, x]
    """
    assert parse(text.replace(b"~, ,", b"~, '',"), place="x") == [
        1, -2, 15, 31, 1.5, 1000.0, 0.5, True, False, None, None, "", "1", "true", "yes", "no", "on", "2024-01-01",
        "1_000", "1:20", "<<", "x",
    ]  # fmt: skip


TEXTS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]))
PLAIN = st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.floats(-1e9, 1e9) | TEXTS
KEYS = st.text("ab: #-'\"", min_size=1)


@given(st.recursive(PLAIN, lambda each: st.lists(each, max_size=3) | st.dictionaries(KEYS, each, max_size=3)))
@example({"version": "1.10", "a": ["1e5", "0x1", "null", "~", "", " ", "- a", "# b", "yes"]})
def test_what_another_library_writes_is_read_back(value: object) -> None:
    stream = StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False  # in flow style libyaml takes less for plain text than YAML 1.2 allows
    writer.dump([value], stream)
    assert parse(stream.getvalue().encode(), place="x") == [value]
    assert parse(json.dumps([value], ensure_ascii=False).encode(), place="x") == [value]


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@,? \n\t0.1~<"), max_size=24))
def test_any_text_is_read_as_another_library_reads_it_or_refused(text: str) -> None:
    try:
        ours = parse(text.encode(), place="x")
    except RegistryError:
        return
    try:
        theirs = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        return  # libyaml takes some of YAML 1.1 that was dropped
    assert ours == _as_text(theirs)


def _as_text(value: object) -> object:
    """Keys are text to us, whatever they look like."""
    if isinstance(value, dict):
        return {_key(key): _as_text(item) for key, item in value.items()}
    return [_as_text(item) for item in value] if isinstance(value, list) else value


def _key(key: object) -> str:
    return key if isinstance(key, str) else "" if key is None else str(key)


EXPLODING = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghi"))

HOSTILE = [
    ("format_version: 2\nentries: []\nentries: []\n", ":3: the key entries stands twice"),
    ('entries: [{id: a, "id": b}]\n', ":1: the key id stands twice"),
    (EXPLODING, ":1: &a is an anchor"),
    ("entries: *all\n", "is an alias"),
    ("entries: !!python/object/apply:os.system [echo]\n", "os.system is a tag"),
    ("entries: !!str 3\n", "is a tag"),
    ("entries: !Entry {}\n", "is a tag"),
    ("a: 1\n--- \nb: 2\n", "a second document begins in line 2"),
    ("entries: [", "not valid YAML"),
    ("entries:\n\t- a\n", "not valid YAML"),
    ("{[a]: b}", "a key must be text"),
    ("entries: [{id: .nan}]", ".nan is no finite number"),
    ("entries: [{size: 1e999}]", "1e999 is no finite number"),
    ("entries: [{size: 99999999999999999999}]", "too large a number"),
    ("entries: [{size: 0x" + "f" * 40 + "}]", "too large a number"),
    ('entries: ["\\e[2J"]', "the control character U+001B"),
    ('entries: ["\\0"]', "the control character U+0000"),
    ("entries: [a\u202eb]", "the control character U+202E"),
    ("entries: [\x07]", "not valid YAML"),
    (b"entries: [\xff]", "is no UTF-8 text"),
    (b"\xfe\xff\x00e", "is no UTF-8 text"),
    ("[" * 100_000, f"nested deeper than {MAX_DEPTH}"),
    ("- " * 100_000, f"nested deeper than {MAX_DEPTH}"),
    ("{" * 100_000, "a key must be text"),
    ('{"a":' * 100_000, f"nested deeper than {MAX_DEPTH}"),
    (b"- a\n" * 1_000_100, "more than 1,000,000 values"),
    (b"#" * (MAX_BYTES + 1), "is larger than the 16 MB"),
    ("? " * 100_000, "a key must be text"),
    ("%TAG ! tag:evil,2000:\n" * 50_000, "not valid YAML"),
    ("&a " * 100_000, "is an anchor"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_yaml_is_refused_soon(text: str | bytes, message: str) -> None:
    began = time.monotonic()
    assert message in refused(text)
    assert time.monotonic() - began < 30  # seconds; most take milliseconds


# --- entries --------------------------------------------------------------------------------------


MALFORMED = [
    ("", "an index without format_version; this vpgtrans reads format_version: 2"),
    ("# nothing yet\n", "an index without format_version"),
    ("entries: []\n", "an index without format_version"),
    ("format_version: 1\nentries: []\n", "an index of format_version '1'; this vpgtrans reads"),
    (
        "format_version: 3\n",
        "an index of format_version '3'; this vpgtrans reads format_version: 2, a newer one reads it",
    ),
    ("format_version: '2'\n", "an index of format_version '2'"),
    ("- a\n", ":1: the document: "),
    ("format_version: 2\nentry: []\n", ":2: entry: is no key of an index; did you mean entries?"),
    ("format_version: 2\nentries: [{id: owl}]\n", ":2: owl.version: is missing"),
    ("format_version: 2\nentries:\n  - 3\n", ":3: entry 1: "),
    ("format_version: 2\nentries: {}\n", ":2: entries: "),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_a_malformed_index_is_explained(text: str, message: str) -> None:
    assert message in refused(text)


def test_a_message_has_the_line_of_what_is_wrong() -> None:
    text = of(values(), values("newt", licence={"spdx": "as you like"}))
    line = text.splitlines().index('    "spdx": "as you like"') + 1
    assert refused(text).startswith(f"here.yaml:{line}: newt.licence.spdx: ")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1.1},
        {"version": "one"},
        {"version": "01.1"},
        {"version": "1.0-rc1"},
        {"id": "Owl Eyes"},
        {"id": "owl/../../eyes"},
        {"id": "o" * 97},
        {"kind": "llm"},
        {"description": True},
        {"description": None},
        {"licence": "MIT"},
        {"licence": None},
        {"licence": {"spdx": ""}},
        {"locations": []},
        {"locations": "checkpoints/owl"},
        {"files": []},
        {"files": [{"path": "a.json", "size": "3", "sha256": "a" * 64}]},
        {"files": [{"path": "a.json", "size": -1, "sha256": "a" * 64}]},
        {"files": [{"path": "a.json", "size": 1.5, "sha256": "a" * 64}]},
        {"files": [{"path": "a.json", "size": True, "sha256": "a" * 64}]},
        {"files": [{"path": "a.json", "size": 3, "sha256": "A" * 64}]},
        {"files": [{"path": "a.json", "size": 3, "sha256": "a" * 63}]},
        {"interface": {"visual_tokens": 0, "width": 1, "image_size": 1, "prompt": ""}},
        {"status": "withdrawn"},
        {"colour": "red"},
    ],
    ids=str,
)
def test_a_wrong_value_names_entry_and_key(changes: dict[str, object]) -> None:
    (key,) = changes
    name = "owl" if key != "id" else str(changes["id"])[:96]
    assert f": {name}.{key}" in refused(of(values(**changes)))


def test_a_number_where_text_belongs_is_said_to_want_quotes() -> None:
    assert "in quotes" in refused("format_version: 2\nentries: [{id: owl, version: 1.10}]")


ESCAPES = [
    "/etc/passwd.json",
    "../outside.json",
    "a/../../outside.json",
    "a/./b.json",
    "a\\b.json",
    "C:/x.json",
    "C:x.json",
    "a/b.json:stream",
    "",
    "a//b.json",
    "a/",
    "a/b.json ",
    "a./b.json",
    "nul\u0000.json",
    "line\nbreak.json",
    "~root\u200f/x.json",
    "a" * 300,
    "ä" * 200,
    "/".join("a" * 600),
]


@pytest.mark.parametrize("path", ESCAPES)
def test_paths_that_escape_are_refused(path: str) -> None:
    with pytest.raises(ValidationError, match=r"locations\n"):
        types.Entry.model_validate(values(locations=[path]))
    with pytest.raises(ValidationError, match=r"path\n"):
        types.FileEntry(path=path, size=0, sha256="0" * 64)


STEPS = ["a", "..", ".", "", "b.txt", "/", "\\", "...", "c:", "~", " "]


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=5))
def test_a_path_that_passes_stays_inside(steps: list[str]) -> None:
    path = "/".join(steps)
    try:
        types.safe_path(path)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/root/entry", path)).startswith("/root/entry/")
    assert "\\" not in path
    assert ":" not in path


@pytest.mark.parametrize(
    "paths",
    [("a.json", "a.json"), ("a.json", "A.json"), ("a", "a/b.json"), ("A/c.json", "a"), ("\u00e9.json", "e\u0301.json")],
)
def test_files_that_would_meet_on_a_disk_are_refused(paths: tuple[str, ...]) -> None:
    listed = [{"path": path, "size": 1, "sha256": "a" * 64} for path in paths]
    assert "files:" in refused(of(values(files=listed)))


@pytest.mark.parametrize(
    "path", ["model.pkl", "model.bin", "model.pt", "a.py", "a.so", "a.safetensors.zip", "x.SAFETENSORS", ".hidden"]
)
def test_weights_are_safetensors_and_code_is_nothing(path: str) -> None:
    assert "weights are .safetensors" in refused(of(values(files=[{"path": path, "size": 1, "sha256": "a" * 64}])))


@pytest.mark.parametrize(
    "location",
    [
        "hf:org/repo",
        "hf:org/repo@v1.0/a",
        "oci:localhost:5000/a/b:1.0",
        f"oci:ghcr.io/a@sha256:{'a' * 64}",
        "s3://bucket/a/b",
        "https://example.org/a?versionId=3",
        "file:///data/a",
        "checkpoints/a",
    ],
)
def test_locations_that_a_store_opens(location: str) -> None:
    assert types.safe_location(location) == location


@pytest.mark.parametrize(
    "location",
    [
        "https://user:secret@example.org/a",
        "https://secret@example.org/a",
        "s3://key:secret@bucket/a",
        "https://example.org/../secret",
        "https://example.org/%2e%2e/secret",
        "https://example.org\\@secret/a",
        "https://",
        "https:secret",
        "s3:",
        "hf:secret",
        "hf:../secret",
        "hf:a/b@../../secret",
        "hf:a/b/secret",
        "oci:user:secret@host/a",
        "oci:host",
        "oci:host/../secret",
        "https://example.org/a b secret",
        "https://example.org/" + "secret" * 500,
    ],
)
def test_locations_that_are_refused_tell_no_secret(location: str) -> None:
    with pytest.raises(ValueError, match="location") as caught:
        types.safe_location(location)
    assert "secret" not in str(caught.value)


def test_a_scheme_that_no_store_has_is_no_path_either() -> None:
    for location in ("ftp://host/a", "javascript:alert", "pip:dist"):
        with pytest.raises(ValueError, match="relative path"):
            types.safe_location(location)


def test_a_reason_goes_with_a_yank() -> None:
    assert "has a reason" in refused(of(values(status="yanked")))
    assert "has a reason" in refused(of(values(reason="damaged")))
    (entry,) = index.parse_index(of(values(status="yanked", reason="damaged")).encode(), place="x")
    assert entry.reason == "damaged"


# --- several versions, several indexes --------------------------------------------------------------


def test_the_newest_version_is_the_default(tmp_path: Path) -> None:
    path = write_index(tmp_path, *(values(version=version) for version in ("1.10", "1.9", "1.2")))
    registry = index.load_index(str(path))
    assert registry.entry("owl").version == "1.10"
    assert registry.entry("owl@1.9").version == "1.9"
    assert [entry.name for entry in registry.versions("owl")] == ["owl@1.2", "owl@1.9", "owl@1.10"]
    assert (len(registry), registry.place) == (3, str(path))


@pytest.mark.parametrize("second", ["1.0", "1", "1.0.0"])
def test_a_version_stands_once(second: str) -> None:
    assert "owl has version" in refused(of(values(), values(version=second)))


def test_a_yanked_version_is_taken_only_by_its_name(tmp_path: Path) -> None:
    yanked = values(version="1.1", status="yanked", reason="it sees nothing")
    path = write_index(tmp_path, values(), yanked)
    assert index.find("owl", index=str(path)).entry.version == "1.0"
    assert index.find("owl@1.1", index=str(path)).entry.status == "yanked"
    write_index(tmp_path, yanked)
    with pytest.raises(RegistryError, match=r"every version of owl was yanked, 1\.1 because: it sees nothing"):
        index.find("owl", index=str(path))


def test_an_unknown_name_is_met_with_a_suggestion(tmp_path: Path) -> None:
    path = str(write_index(tmp_path, values()))
    with pytest.raises(RegistryError, match="did you mean owl"):
        index.find("olw", index=path)
    with pytest.raises(RegistryError, match="it has: owl"):
        index.find("completely-different", index=path)
    with pytest.raises(RegistryError, match=r"no version '2\.0'; it has: 1\.0"):
        index.find("owl@2.0", index=path)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without an index."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delenv(index.PLACES, raising=False)
    return tmp_path


def test_where_indexes_are_looked_for(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(TOP / index.FILE_NAME)
    assert index.places() == [own]
    here = write_index(Path.cwd(), values())
    assert index.places() == [str(here), own]
    (elsewhere / "with blank").mkdir()
    stated = [write_index(elsewhere, values()), write_index(elsewhere / "with blank", values())]
    monkeypatch.setenv(index.PLACES, f"{stated[0]}  https://example.org/x.yaml '{stated[1].parent}' {own}")
    assert index.places() == [str(stated[0]), "https://example.org/x.yaml", str(stated[1].parent), own, str(here)]
    assert index.load_index().place == str(stated[0])
    assert index.load_index(str(stated[1].parent)).place == str(stated[1])
    monkeypatch.setenv(index.PLACES, "'a")
    with pytest.raises(RegistryError, match="blanks between"):
        index.places()


def test_the_first_index_that_knows_an_id_has_all_its_versions(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise whoever can write to one of them gets a newer version of anything taken."""
    first = write_index(elsewhere / "first.yaml", values())
    second = write_index(elsewhere / "second.yaml", values(version="9.0"), values("newt"))
    monkeypatch.setenv(index.PLACES, f"{first} {second}")
    assert index.find("owl") == (index.load_index(str(first)).entries[0], str(first))
    assert index.find("newt").place == str(second)
    with pytest.raises(RegistryError, match="no version"):
        index.find("owl@9.0")
    with pytest.raises(RegistryError, match=r"first\.yaml.*second\.yaml.* did you mean newt\?"):
        index.find("newtt")


@pytest.mark.parametrize("what", ["missing", "directory", "pipe", "a:b"])
def test_an_index_that_cant_be_read(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    place = elsewhere / what
    if what == "directory":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    monkeypatch.setenv(index.PLACES, str(place))
    with pytest.raises(RegistryError, match=r"no such index file .*blanks between"):
        index.load_index()


def test_a_huge_index_is_not_read_whole(elsewhere: Path) -> None:
    path = elsewhere / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RegistryError, match="larger than the 16 MB"):
        index.load_index(str(path))


def test_an_index_at_a_url_is_kept_for_when_it_cant_be_reached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = "https://example.org/index.yaml?signature=secret"
    answers: list[bytes | Exception] = [StoreError("example.org doesn't answer")]

    def read_small(asked: str, limit: int) -> bytes:
        assert (asked, limit) == (url, MAX_BYTES)
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path))
    monkeypatch.setattr("vpgtrans.registry.stores.read_small", read_small)
    with pytest.raises(StoreError):
        index.load_index(url)
    answers[0] = of(values()).encode()
    assert index.load_index(url).place == url
    answers[0] = b"<html>please log in</html>"
    with pytest.raises(RegistryError) as caught:
        index.load_index(url)
    assert "secret" not in str(caught.value)
    answers[0] = StoreError("example.org doesn't answer")
    assert index.load_index(url).entry("owl").version == "1.0"
    assert "doesn't answer; taking what the index said when it was last read" in caplog.text
    with pytest.raises(RegistryError, match="no entry") as caught:
        index.find("newt", index=url)
    assert "secret" not in str(caught.value)


def test_an_index_url_with_credentials_is_refused_without_saying_them() -> None:
    with pytest.raises(RegistryError, match="carries credentials") as caught:
        index.load_index("https://me:secret@example.org/index.yaml")
    assert "secret" not in str(caught.value)


def test_entries_are_chosen_by_kind_encoder_base_and_status() -> None:
    entries = [
        types.Entry.model_validate(values()),
        types.Entry.model_validate(values("newt", kind="vpg", status="yanked", reason="old")),
    ]
    names = {
        ("kind", "vpg"): ["newt"],
        ("status", "active"): ["owl"],
        ("base", "SmolLM2"): ["owl", "newt"],
        ("base", "llama"): ["owl", "newt"],
        ("base", "gemma"): [],
        ("encoder", "EfficientNet"): ["owl", "newt"],
        ("encoder", "pip:eyes"): ["owl", "newt"],
        ("encoder", "clip"): [],
    }
    for (key, value), found in names.items():
        assert [entry.id for entry in index.choose(entries, **{key: value})] == found


# --- the project's own ------------------------------------------------------------------------------


def test_the_projects_own_index_is_right_and_says_its_schema() -> None:
    path = TOP / index.FILE_NAME
    assert len(index.load_index(str(path))) > 0
    schema = path.read_text().splitlines()[0].partition("$schema=")[2]
    assert (TOP / schema).is_file()


def test_the_committed_schema_is_current_and_takes_what_we_take() -> None:
    path = TOP / "checkpoints_registry.schema.json"
    assert path.read_text() == types.json_schema() + "\n", (
        "run: python -m vpgtrans.registry.entry > checkpoints_registry.schema.json"
    )
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(YAML(typ="safe", pure=True).load(TOP / index.FILE_NAME), schema)
    jsonschema.validate(json.loads(of(values())), schema)
    for changes in ({"version": 1.1}, {"colour": "red"}, {"kind": "llm"}, {"files": []}, {"id": "Owl Eyes"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(of(values(**changes))), schema)
