"""An index changed by text: comments stay, nothing else changes, and several processes lose nothing."""

import json
import multiprocessing
import os
import signal
import stat
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpgtrans.errors import OutputError, RegistryError
from vpgtrans.registry import edit
from vpgtrans.registry.entry import Entry
from vpgtrans.registry.index import load_index, parse_index
from vpgtrans.registry.strict_yaml import _UNSAFE

SHA = "12345678901234567890123456789012345678901234567890123456789e0123"
"""A hash that YAML would take for a number."""


def entry(id: str = "owl", version: str = "1.0", **changes) -> Entry:
    values = {
        "id": id,
        "version": version,
        "kind": "vpg",
        "description": "eyes of an owl: sharp, # and 'quoted'",
        "locations": ["checkpoints/owl"],
        "files": [{"path": "manifest.json", "size": 3, "sha256": SHA}],
        "base": {"llm": {"reference": "pip:llm", "width": 8, "vocabulary": 9, "tokenizer_sha256": "a" * 64}},
        "interface": {"visual_tokens": 4, "width": 16, "image_size": 32, "prompt": "Repeat:<image>\nRepeat:"},
        "licence": {"spdx": "MIT"},
    }
    return Entry.model_validate(values | changes)


@pytest.fixture
def index(tmp_path) -> Path:
    return tmp_path / "checkpoints_registry.yaml"


def test_an_index_is_made_and_grows(index):
    edit.append(index, entry())
    edit.append(index, entry(version="1.1", lineage={"seed": 3}))
    edit.append(index, entry("newt"))
    found = load_index(str(index))
    assert [each.name for each in found] == ["owl@1.0", "owl@1.1", "newt@1.0"]
    assert found.entries[0] == entry()
    assert found.entry("owl@1.1").lineage.seed == 3


def test_what_an_id_and_a_version_name_never_changes(index):
    edit.append(index, entry())
    before = index.read_bytes()
    for version in ("1.0", "1", "1.0.0"):
        with pytest.raises(RegistryError, match=r"owl@1\.0 is there already.*--version"):
            edit.append(index, entry(version=version, description="another"))
    assert index.read_bytes() == before


COMMENTED = """\
# ours
format_version: 2   # the newest
entries:
# the first
- id: newt
  version: "1"     # in quotes
  kind: vpg
  description: >-
    eyes of
    a newt
  locations: [far]
  files: [{path: a.json, size: 1, sha256: '0000000000000000000000000000000000000000000000000000000000000000'}]
  base: {llm: {reference: pip:llm, width: 8, vocabulary: 9, tokenizer_sha256: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa}}
  interface: {visual_tokens: 4, width: 16, image_size: 32, prompt: look}
  licence: {spdx: MIT}
  status: active   # so far
# the end
"""  # noqa: E501


def test_comments_and_all_other_lines_stay(index):
    index.write_text(COMMENTED)
    edit.append(index, entry())
    lines = iter(index.read_text().splitlines())
    assert all(line in lines for line in COMMENTED.splitlines())  # in this order
    assert [each.id for each in load_index(str(index))] == ["newt", "owl"]
    edit.yank("newt", reason="its eyes: # too small", index=str(index))
    assert '  status: yanked   # so far\n  reason: "its eyes: # too small"\n' in index.read_text()
    assert set(COMMENTED.splitlines()) - set(index.read_text().splitlines()) == {"  status: active   # so far"}
    assert load_index(str(index)).entry("newt@1").reason == "its eyes: # too small"
    assert load_index(str(index)).entry("newt@1").description == "eyes of a newt"


@pytest.mark.parametrize(
    "text",
    [
        "format_version: 2\n",
        "format_version: 2\nentries:\n",
        "format_version: 2\nentries:   # none yet\n# more\n",
        "format_version: 2\nentries: []\n",
        "format_version: 2\nentries: [ ]  # none",
        "entries: []\nformat_version: 2",
        "format_version: 2\r\nentries:\r\n",
        "\ufeffformat_version: 2\nentries: null\n",
    ],
)
def test_an_empty_index_of_any_form_takes_an_entry(index, text):
    index.write_bytes(text.encode())
    edit.append(index, entry())
    edit.append(index, entry("newt"))
    assert [each.id for each in load_index(str(index))] == ["owl", "newt"]
    assert "# none" in text or "none" not in index.read_text()
    assert ("# more" in text) == ("# more" in index.read_text())


@pytest.mark.parametrize("turned", [False, True])
def test_an_entry_goes_into_the_list_wherever_that_stands(index, turned):
    edit.append(index, entry())
    text = index.read_text().partition("entries:")
    body = textwrap.indent(textwrap.dedent(text[2].strip("\n")), "      ")
    index.write_text("entries:\n" + body + ("\nformat_version: 2\n" if turned else ""))
    if not turned:
        index.write_text("format_version: 2\n" + index.read_text())
    edit.append(index, entry("newt"))
    assert [each.id for each in load_index(str(index))] == ["owl", "newt"]
    assert "\n      - id: newt\n" in index.read_text()


def test_what_can_not_be_changed_line_by_line_is_refused(index):
    document = {"format_version": 2, "entries": [json.loads(entry().model_dump_json())]}
    index.write_text(json.dumps(document))
    before = index.read_bytes()
    with pytest.raises(RegistryError, match="in one line"):
        edit.append(index, entry("newt"))
    with pytest.raises(RegistryError, match="in one line"):
        edit.yank("owl", reason="x", index=str(index))
    assert index.read_bytes() == before


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    description=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=80),
    prompt=st.sampled_from(["a\nb", "- x: [", "yes", "1e5", "0x1f", "~", "# no", " blank ", "'\"", "{a}", "*b", "|"]),
    reason=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40),
)
def test_any_text_comes_back_or_is_refused(tmp_path, description, prompt, reason):
    index = tmp_path / "index.yaml"
    index.unlink(missing_ok=True)
    made = entry(description=description, interface=entry().interface.model_copy(update={"prompt": prompt}))
    if _UNSAFE.search(description):
        with pytest.raises(RegistryError, match="control character"):
            edit.append(index, made)
        return
    edit.append(index, made)
    assert load_index(str(index)).entries == (made,)
    if not reason.strip() or _UNSAFE.search(" ".join(reason.split())):
        with pytest.raises(RegistryError, match=r"reason|control character"):
            edit.yank("owl", reason=reason, index=str(index))
        return
    yanked, _ = edit.yank("owl", reason=reason, index=str(index))
    assert load_index(str(index)).entries == (yanked,)
    assert yanked.reason == " ".join(reason.split())


def test_yank_says_what_is_wrong_with_its_name(index):
    edit.append(index, entry())
    edit.append(index, entry(version="2.0"))
    for name, message in [("newt", "no entry 'newt'"), ("owl@3", r"owl@1\.0, owl@2\.0"), ("owl", "which version")]:
        with pytest.raises(RegistryError, match=message):
            edit.yank(name, reason="x", index=str(index))
    with pytest.raises(RegistryError, match="needs a reason"):
        edit.yank("owl@1.0", reason="  ", index=str(index))
    edit.yank("owl@1.0", reason="blind", index=str(index))
    with pytest.raises(RegistryError, match="yanked already: blind"):
        edit.yank("owl@1.0", reason="again", index=str(index))
    assert load_index(str(index)).entry("owl").version == "2.0"


def test_a_status_that_is_not_written_out_is_added(index):
    edit.append(index, entry())
    index.write_text("".join(line for line in index.read_text().splitlines(keepends=True) if "status" not in line))
    edit.yank("owl", reason="blind", index=str(index))
    assert load_index(str(index)).entry("owl@1.0").reason == "blind"


def test_which_index_is_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VPGTRANS_REGISTRY", f"https://elsewhere.example/x.yaml {tmp_path / 'team'}")
    (tmp_path / "team").mkdir()
    assert edit.writable_index(None) == tmp_path / "team" / "checkpoints_registry.yaml"
    assert edit.writable_index("own.yaml") == tmp_path / "own.yaml"
    with pytest.raises(RegistryError, match="at a URL can't be changed"):
        edit.writable_index("s3://bucket/index.yaml")


def test_a_link_to_an_index_stays_one_and_its_mode_too(tmp_path):
    index = tmp_path / "real.yaml"
    edit.append(index, entry())
    index.chmod(0o664)
    link = tmp_path / "link.yaml"
    link.symlink_to(index)
    edit.append(edit.writable_index(str(link)), entry("newt"))
    assert link.is_symlink()
    assert stat.S_IMODE(index.stat().st_mode) == 0o664
    assert len(load_index(str(index))) == 2


def test_a_malformed_index_is_left_alone(index):
    index.write_text("format_version: 2\nentries:\n  - id: owl\n")
    with pytest.raises(RegistryError, match=r"owl\.version"):
        edit.append(index, entry("newt"))
    assert "newt" not in index.read_text()


def test_an_index_that_can_not_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="can't be written"):
        edit.append(tmp_path / "file" / "index.yaml", entry())


def _publish_some(index: Path, who: int, many: int) -> None:
    for number in range(many):
        edit.append(index, entry(f"p{who}", f"{number + 1}"))


def test_publishers_at_once_lose_nothing_even_when_some_are_killed(index):
    """Four write; a fifth is killed again and again in the midst of it. The index is valid whenever it is read."""
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_publish_some, args=(index, who, 6)) for who in range(4)]
    for worker in workers:
        worker.start()
    looks = kills = 0
    while any(worker.is_alive() for worker in workers):
        victim = context.Process(target=_publish_some, args=(index, 100 + kills, 50))
        victim.start()
        time.sleep(0.05 + 0.01 * (kills % 7))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        kills += 1
        if index.exists():
            parse_index(index.read_bytes(), place="index")
            looks += 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    names = [each.name for each in load_index(str(index))]
    assert len(names) == len(set(names))
    assert {f"p{who}@{number + 1}" for who in range(4) for number in range(6)} <= set(names)
    assert kills > 1
    assert looks > 1
