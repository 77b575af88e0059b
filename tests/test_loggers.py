"""metrics.csv beside metrics.jsonl, and the loggers that a recipe asks for: their own files are read back."""

import csv
import importlib.metadata
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_guard import guarded, run_damaged
from test_resume import Crash, crash_at
from tiny_training import FINETUNE, WARMUP, build_vlm, lines, make_recipe, train

from vpgtrans.errors import RecipeError
from vpgtrans.training.log import COLUMNS
from vpgtrans.training.loggers import check_loggers


def table(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def numbers(run: Path) -> list[tuple[str, int, str, float]]:
    """(tag's stage, samples, tag's name, value) of every number in metrics.jsonl."""
    return [
        (line["stage"], line["samples"], name, value)
        for line in lines(run / "metrics.jsonl")
        for name, value in line.items()
        if isinstance(value, int | float) and name not in ("update", "samples", "text_tokens", "seconds")
    ]


def test_the_table_holds_what_the_lines_hold(root, tmp_path):
    run_damaged(root, tmp_path, guarded(max_skipped=20))
    rows, log = table(tmp_path), lines(tmp_path / "metrics.jsonl")
    assert any("skipped" in line for line in log)
    assert len(rows) == len(log)
    for row, line in zip(rows, log, strict=True):
        assert tuple(row) == COLUMNS
        assert {name for name in line if not isinstance(line[name], list)} <= set(COLUMNS)
        for name in COLUMNS:
            assert row[name] == ("" if line.get(name) is None else str(line[name])), name


def test_a_new_run_begins_a_new_table_and_a_resumed_one_doubles_nothing(root, tmp_path):
    recipe = make_recipe([WARMUP, FINETUNE])
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 5)
        with pytest.raises(Crash):
            train(build_vlm(root), recipe, tmp_path)
    train(build_vlm(root), recipe, tmp_path, resume=True)
    places = [(row["stage"], row["update"], row["val_loss"] == "") for row in table(tmp_path)]
    assert len(places) == len(set(places)) == len(lines(tmp_path / "metrics.jsonl"))
    (tmp_path / "metrics.jsonl").unlink()
    train(build_vlm(root), make_recipe([WARMUP]), tmp_path)
    assert {row["stage"] for row in table(tmp_path)} == {"warmup"}


def test_throughput_and_memory_are_in_the_log_and_the_results(root, tmp_path):
    results = train(build_vlm(root), make_recipe([WARMUP, FINETUNE]), tmp_path)
    log = [line for line in lines(tmp_path / "metrics.jsonl") if "loss" in line]
    for line in log:
        assert line["samples_per_second"] > 0
        # prompts of three tokens, and the words
        assert line["tokens_per_second"] > 3 * line["samples_per_second"]
        assert (line["mfu"], line["memory_bytes"] > 2**20) == (None, True)
    for result in results:
        rates = [line["samples_per_second"] for line in log if line["stage"] == result.name]
        assert min(rates) <= result.samples_per_second <= max(rates)
        assert result.tokens_per_second > 0


def events(run: Path) -> set[tuple[str, int, str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    found = []
    for tag in reader.Tags()["scalars"]:
        stage, name = tag.split("/")
        found += [(stage, event.step, name, event.value) for event in reader.Scalars(tag) if name != "epoch"]
    assert len(found) == len({each[:3] for each in found})  # none twice
    return set(found)


def test_tensorboard_has_every_number_once_also_of_a_resumed_run(root, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = make_recipe([WARMUP, FINETUNE], trainer={"precision": "fp32", "devices": 1, "loggers": ["tensorboard"]})
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 5)
        with pytest.raises(Crash):
            train(build_vlm(root), recipe, tmp_path)
    train(build_vlm(root), recipe, tmp_path, resume=True)
    found = {each[:3]: each[3] for each in events(tmp_path)}
    clocked = {"samples_per_second", "tokens_per_second", "memory_bytes"}
    expected = numbers(tmp_path)
    assert set(found) == {each[:3] for each in expected}
    for *place, value in expected:
        if place[2] not in clocked:  # those are of the first time
            assert found[tuple(place)] == pytest.approx(value, rel=1e-6)


def records(data: bytes) -> list[bytes]:
    """Of a LevelDB log: blocks of 32 KiB, and in them checksum (4 bytes), length (2), kind (1) and a piece each.

    Kinds: 1 a whole record, 2 its first, 3 a middle and 4 its last piece. W&B's file begins with 7 bytes of its own.
    """
    found, place = [b""], 7
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        found[-1] += data[place + 7 : place + 7 + length]
        if kind in (1, 4):
            found.append(b"")
        place += 7 + length
    return found[:-1]


def history(data: bytes) -> set[tuple[str, str]]:
    """Keys and JSON of all that was logged."""
    from wandb.proto import wandb_internal_pb2

    found = set()
    for text in records(data):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(text)
        found |= {(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item}
    return found


def test_wandb_keeps_a_run_offline(root, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = make_recipe([WARMUP], trainer={"precision": "fp32", "devices": 1, "loggers": ["wandb"]})
    train(build_vlm(root), recipe, tmp_path)
    assert wandb.run is None  # it is closed
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    found = set()
    for _ in range(100):  # its own process writes the file, and may be a little behind
        found = history(file.read_bytes())
        if any(key == "trainer/global_step" and said == "24" for key, said in found):
            break
        time.sleep(0.2)
    told = {(key, float(said)) for key, said in found if key.startswith("warmup/")}
    # Every number: text and float of a JSON number round differently in the last digit, if at all.
    expected = {(f"{stage}/{name}", float(value)) for stage, _, name, value in numbers(tmp_path)}
    assert {(key, f"{value:.9g}") for key, value in told} == {(key, f"{value:.9g}") for key, value in expected}


def test_trackio_is_told_every_number(root, tmp_path, monkeypatch):
    told, calls = [], []
    run = SimpleNamespace(
        log=lambda figures, step: told.extend((name, step, value) for name, value in figures.items()),
        finish=lambda: calls.append("finish"),
    )

    def init(**keywords):
        calls.append((keywords["project"], keywords["resume"], keywords["name"].startswith("tiny-")))
        return run

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    recipe = make_recipe([WARMUP], trainer={"precision": "fp32", "devices": 1, "loggers": ["trackio"]})
    train(build_vlm(root), recipe, tmp_path)
    assert calls == [("vpgtrans", "allow", True), "finish"]
    assert told == [(f"{stage}/{name}", samples, value) for stage, samples, name, value in numbers(tmp_path)]


@pytest.mark.parametrize(("there", "saying"), [(None, "is not installed"), ("0.0.6", "here in version 0.0.6, and 0.5")])
def test_a_missing_package_is_one_message_with_the_extra(monkeypatch, there, saying):
    def version(name):
        if there is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr("vpgtrans.training.loggers.version", version)
    monkeypatch.setattr("vpgtrans.training.loggers.find_spec", lambda name: object())
    check_loggers([])
    with pytest.raises(RecipeError, match=rf"trainer.loggers: trackio: .*{saying}.*pip install 'vpgtrans\[loggers\]'"):
        check_loggers(["trackio"])
