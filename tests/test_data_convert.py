"""`vpgtrans data convert`: every layout comes back as it was; killed, damaged, repeated, it gives the same bytes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from PIL import Image

from vpgtrans.cli.data_source import _OPTIONS
from vpgtrans.data.config import DataSource
from vpgtrans.data.sample import Sample
from vpgtrans.data.sources import fetched, open_dataset
from vpgtrans.errors import DataError

TARGETS = ("parquet", "webdataset")


def picture(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (30 * number % 256, 40, 200)).save(stream, kind)
    return stream.getvalue()


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines with image paths, and the images p0.png to p4.jpg beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP")):
        (folder / f"p{number}").write_bytes(picture(number, kind))
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


LAYOUTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "caption": (
        {},
        [
            {"id": "a", "image": "p0", "caption": ["one  two", "drei vier", "ünï 😀"]},
            {"id": 7, "image": "p1", "caption": 'a "quoted"\nline'},
            {"image": ["p2"], "caption": "without an id"},
        ],
    ),
    "captions of several images": (
        {},
        [
            {"image": ["p0", "p1"], "caption": "both"},
            {"image": "p2", "caption": "one"},
            {"image": [f"p{n % 5}" for n in range(12)], "caption": "more than ten, in order"},
        ],
    ),
    "question": (
        {"question": "question", "answer": "answer"},
        [
            {"image": "p0", "question": "What is it?", "answer": ["a cat", "cat"]},
            {"image": "p3", "question": "Look: <image> what?", "answer": "a dog"},
            {"question": "Two and two?", "answer": "four"},
        ],
    ),
    "conversation": (
        {"conversation": "conversations"},
        [
            {
                "image": ["p0", "p4"],
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "<image>\nAnd <image>?"},
                    {"from": "gpt", "value": "Yes."},
                    {"from": "human", "value": "Sure?"},
                    {"from": "gpt", "value": "No."},
                ],
            },
            {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        ],
    ),
    "document": (
        {"document": "texts", "image": "images"},
        [
            {"images": ["p0", None, "p1"], "texts": [None, " in between ", None]},
            {"images": [], "texts": "words alone\n"},
        ],
    ),
    "text": ({"text": "body"}, [{"body": "some words"}, {"id": "x", "body": "other words"}]),
}


def converted(*arguments: str | Path) -> dict[str, Any]:
    result = invoke("data", "convert", *arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["rows"] == found["written"] + found["quarantined"] + found["dropped"]
    return found


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def samples(source: DataSource) -> list[Sample]:
    """All of them, their images as bytes."""
    opened = open_dataset(source)
    read = [opened.sample(row) for row in range(len(opened))]
    return [replace(s, images=tuple(i if isinstance(i, bytes) else fetched(i) for i in s.images)) for s in read]


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_as_it_was(tmp_path: Path, layout: str, to: str):
    keys, rows = LAYOUTS[layout]
    file = write(tmp_path / "in", rows)
    images = "list" if "several" in layout else "auto"
    more = ["--source", json.dumps(keys), "--to", to, "--rows-per-shard", "2", "--images", images]
    found = converted(file, tmp_path / "out", *more)
    assert found["written"] == len(rows)
    assert found["shards"] == -(-len(rows) // 2)
    before = samples(DataSource(dataset=str(file), **keys))
    assert samples(DataSource(**found["source"])) == before
    assert sum(len(sample.images) for sample in before) or layout == "text"


def test_the_printed_yaml_reads_it_back(tmp_path: Path):
    from ruamel.yaml import YAML

    file = write(tmp_path / "in", LAYOUTS["question"][1])
    out = tmp_path / "a name: with signs"
    arguments = ("--question", "question", "--answer", "answer", "--split", "val", "--to", "parquet")
    result = invoke("data", "convert", file, out, *arguments)
    assert result.exit_code == 0, result.output
    recipe = YAML(typ="safe").load(result.stdout.partition("in a recipe:\n")[2])
    (entry,) = recipe["data"]["train"]
    assert entry == {"dataset": str(out), "split": "val", "question": "question", "answer": "answer"}
    assert len(open_dataset(DataSource(**entry))) == 3


def spoiled(folder: Path, *, count: int = 23) -> Path:
    """Rows of which 4 and 21 have no readable image, 10 is malformed, and 11 has no caption."""
    rows: list[dict[str, Any]] = [{"id": f"r{n}", "image": f"p{n % 5}", "caption": f"row {n}"} for n in range(count)]
    rows[4]["image"], rows[21]["image"] = "no such file", "broken"
    rows[10]["caption"], rows[11]["caption"] = 5, ""
    file = write(folder, rows)
    (folder / "broken").write_bytes(picture(0)[:40])
    return file


@pytest.mark.parametrize("to", TARGETS)
def test_bad_rows_are_counted_and_listed_and_a_second_call_writes_nothing(tmp_path: Path, to: str):
    file, out = spoiled(tmp_path / "in"), tmp_path / "out"
    found = converted(file, out, "--to", to, "--rows-per-shard", "5")
    assert (found["rows"], found["written"], found["quarantined"], found["dropped"]) == (23, 19, 3, 1)
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["id"]) for entry in listed] == [(4, "r4"), (10, "r10"), (21, "r21")]
    assert "data.jsonl, line 5" in listed[0]["reason"]
    assert "No such file" in listed[0]["reason"]
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = converted(file, out, "--to", to, "--rows-per-shard", "5")
    assert again == found | {"reused": found["shards"]}
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "quarantine", "half"])
def test_damage_is_recognised_and_written_anew(tmp_path: Path, to: str, damage: str):
    file, out = spoiled(tmp_path / "in"), tmp_path / "out"
    arguments = (file, out, "--to", to, "--rows-per-shard", "5")
    shards = converted(*arguments)["shards"]
    whole = content(out)
    second = sorted(name for name in whole if name.startswith("train-"))[1]
    middle = len(whole[second]) // 2
    if damage == "flipped":
        changed = bytes([whole[second][middle] ^ 1])
        (out / second).write_bytes(whole[second][:middle] + changed + whole[second][middle + 1 :])
    elif damage == "cut":
        (out / second).write_bytes(whole[second][:middle])
    elif damage == "gone":
        (out / second).unlink()
    elif damage == "quarantine":
        (out / "quarantine.jsonl").write_text("{}\n")
    else:
        (out / f".{second}.part").write_bytes(b"half")
    reused = converted(*arguments)["reused"]
    # where the list of bad rows is lost, all shards that had some are read again
    assert reused == {"half": shards, "quarantine": shards - 3}.get(damage, shards - 1)
    assert content(out) == whole


def test_a_list_of_bad_rows_that_was_lost_twice_is_whole_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Interrupted while the list is written anew, the next call must not take its beginning for all of it."""
    from vpgtrans.data import convert as module

    file, out = spoiled(tmp_path / "in"), tmp_path / "out"
    arguments = (file, out, "--to", "parquet", "--rows-per-shard", "5")
    converted(*arguments)
    whole = content(out)
    (out / "quarantine.jsonl").unlink()
    commit = module._Conversion._commit

    def stop(self: Any, bad: Any, **options: Any) -> None:
        commit(self, bad, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Conversion, "_commit", stop)
        assert invoke("data", "convert", *arguments).exit_code == 130
    assert content(out) != whole
    converted(*arguments)
    assert content(out) == whole


@pytest.mark.parametrize("to", TARGETS)
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(tmp_path: Path, to: str):
    folder, count = tmp_path / "in", 60
    folder.mkdir()
    for number in range(4):  # small files that take a while to decode
        Image.new("RGB", (2500, 2500), (50 * number, 9, 9)).save(folder / f"{number}.png", compress_level=1)
    rows = [{"id": str(n), "image": f"{n % 4}.png" if n % 13 else "none", "caption": f"row {n}"} for n in range(count)]
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "vpgtrans", "data", "convert", str(file), str(out), "--to", to,
                "--rows-per-shard", "3", "--json"]  # fmt: skip

    out = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(out), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(out.glob("train-*"))) >= 4:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait(timeout=60) == -signal.SIGKILL
    done = len(json.loads((out / "manifest.json").read_text())["shards"])
    assert 3 <= done < 15

    found = converted(*command(out)[5:-1])
    assert found["reused"] == done
    assert found["quarantined"] == 5
    converted(*command(tmp_path / "whole")[5:-1])
    assert content(out) == content(tmp_path / "whole")


def test_what_does_not_belong_together_is_refused(tmp_path: Path):
    file, out = spoiled(tmp_path / "in"), tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    refused = invoke("data", "convert", file, tmp_path / "other", "--to", "parquet")
    assert refused.exit_code == 2
    assert "holds notes.txt" in refused.output

    converted(file, out, "--to", "parquet", "--rows-per-shard", "5")
    before = content(out)
    (out / "stray.parquet").write_bytes(b"x")
    stray = invoke("data", "convert", file, out, "--to", "parquet", "--rows-per-shard", "5")
    (out / "stray.parquet").unlink()
    settings = invoke("data", "convert", file, out, "--to", "parquet", "--rows-per-shard", "6")
    file.write_text(file.read_text().replace("row 3", "row three"))
    source = invoke("data", "convert", file, out, "--to", "parquet", "--rows-per-shard", "5")
    for result, message in (
        (stray, "holds stray.parquet"),
        (settings, "begun with rows 5"),
        (source, "shards of another source: another fingerprint"),
    ):
        assert result.exit_code == 2
        assert message in result.output
    assert content(out) == before


def test_one_process_at_a_time(tmp_path: Path):
    from vpgtrans.files import owned

    file = write(tmp_path / "in", LAYOUTS["text"][1])
    with owned(tmp_path / "out"):
        result = invoke("data", "convert", file, tmp_path / "out", "--text", "body", "--to", "parquet")
    assert result.exit_code == 2
    assert "another process" in result.output


def test_more_images_than_the_first_rows_have_are_named_with_the_remedy(tmp_path: Path):
    file = write(tmp_path / "in", [{"image": "p0", "caption": "one"}, {"image": ["p0", "p1"], "caption": "two"}])
    assert converted(file, tmp_path / "out", "--to", "parquet")["quarantined"] == 1
    assert "--images list" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_nothing_to_write_and_nothing_to_write_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path / "in", [{"image": "missing", "caption": "one"}])
    empty = invoke("data", "convert", file, tmp_path / "out", "--to", "parquet")
    assert empty.exit_code == 2
    assert "none of its 1 rows" in empty.output
    monkeypatch.setitem(sys.modules, "webdataset", None)
    without = invoke("data", "convert", file, tmp_path / "tars", "--to", "webdataset")
    assert without.exit_code == 2
    assert "vpgtrans[webdataset]" in without.output
    assert not (tmp_path / "tars").exists()


def test_a_text_that_is_no_unicode_is_a_bad_row(tmp_path: Path):
    file = write(tmp_path / "in", [{"body": "fine"}])
    with file.open("a") as stream:
        stream.write('{"id": "half", "body": "half \\ud83d"}\n')
    assert converted(file, tmp_path / "out", "--text", "body", "--to", "parquet")["quarantined"] == 1
    assert "half a character" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_an_id_that_is_no_unicode_is_written_with_a_mark(tmp_path: Path):
    file = write(tmp_path / "in", [{"body": "fine", "id": "half \ud83d"}])
    found = converted(file, tmp_path / "out", "--text", "body", "--to", "parquet")
    assert [sample.id for sample in samples(DataSource(**found["source"]))] == ["half ?"]


def test_shards_end_by_size(tmp_path: Path):
    rows = [{"body": "x" * 400} for _ in range(10)]
    file = write(tmp_path / "in", rows)
    assert converted(file, tmp_path / "out", "--text", "body", "--to", "parquet", "--shard-size", "1kB")["shards"] == 4
    wrong = invoke(
        "data", "convert", file, tmp_path / "out", "--text", "body", "--to", "parquet", "--shard-size", "big"
    )
    assert wrong.exit_code == 2
    assert "256MB" in wrong.output


def test_every_key_of_a_data_source_has_an_option(tmp_path: Path):
    assert set(DataSource.model_fields) - set(_OPTIONS) == {"dataset", "weight", "streaming"}
    result = invoke(
        "data", "convert", tmp_path / "x.jsonl", tmp_path / "out", "--to", "parquet", "--source", "{colunm: x}"
    )
    assert result.exit_code == 2
    assert "colunm" in result.output


def test_help_loads_no_torch():
    script = "import sys; from vpgtrans.cli.root import cli\n" + "\n".join(
        f"cli(['data', {verb!r}, '--help'], standalone_mode=False)" for verb in ("convert", "filter")
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nassert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Examples:") == 2


def test_a_malformed_manifest_is_no_conversion(tmp_path: Path):
    file, out = write(tmp_path / "in", LAYOUTS["text"][1]), tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "something else"}')
    result = invoke("data", "convert", file, out, "--text", "body", "--to", "parquet")
    assert result.exit_code == 2
    assert "no manifest of a conversion" in result.output


def test_a_missing_source_is_one_message(tmp_path: Path):
    with pytest.raises(DataError):
        open_dataset(DataSource(dataset=str(tmp_path / "none.jsonl")))
    assert invoke("data", "convert", tmp_path / "none.jsonl", tmp_path / "out", "--to", "parquet").exit_code == 2
    assert not (tmp_path / "out").exists()
