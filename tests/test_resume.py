"""Interrupted and resumed runs equal uninterrupted ones bit for bit; damaged checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import (
    FINETUNE,
    PACKING,
    WARMUP,
    all_tensors,
    build_vlm,
    data_keys,
    lines,
    make_recipe,
    mixtures,
    train,
)  # fmt: skip

from vpgtrans.errors import CheckpointError
from vpgtrans.recipe import Recipe
from vpgtrans.training.checkpoints import Checkpoint, Checkpoints, Progress
from vpgtrans.training.module import StageModule
from vpgtrans.training.stopping import Stopped, StopSignals

SCRIPT = Path(__file__).parent / "tiny_training.py"


class Crash(BaseException):
    """The process ends here."""


def six_updates(packing: dict[str, int] | None) -> list[dict]:
    """Two stages; an update of packs holds 4.7 samples."""
    return [{**stage, "budget": {"samples": 28 if packing else 24}} for stage in (WARMUP, FINETUNE)]


@pytest.fixture(scope="module", params=[None, PACKING], ids=["padded", "packed"])
def whole(root, tmp_path_factory, request):
    """A run that nothing interrupted: its tensors, its log, its results; and its recipe."""
    run, vlm = tmp_path_factory.mktemp("whole"), build_vlm(root)
    recipe = make_recipe(six_updates(request.param), data=data_keys(packing=request.param))
    results = train(vlm, recipe, run)
    return all_tensors(vlm), lines(run / "metrics.jsonl"), results, recipe


def crash_at(patch: pytest.MonkeyPatch, stage: str, update: int) -> None:
    step = StageModule.training_step

    def training_step(self, batch, batch_idx):
        if self.stage.name == stage and self.done == update:
            raise Crash
        step(self, batch, batch_idx)

    patch.setattr(StageModule, "training_step", training_step)


CLOCKED = {"seconds", "samples_per_second", "tokens_per_second", "mfu", "memory_bytes"}


def without_clock(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in log]


def assert_same(vlm, run: Path, results, whole) -> None:
    tensors, log, expected, _ = whole
    ours = all_tensors(vlm)
    assert ours.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(ours[name], tensors[name])] == []
    assert without_clock(lines(run / "metrics.jsonl")) == without_clock(log)
    for result, other in zip(results, expected, strict=True):
        for field in ("name", "updates", "samples", "val_loss", "best_samples", "text_tokens"):
            assert getattr(result, field) == getattr(other, field)


@pytest.mark.parametrize(
    ("stage", "update"), [("warmup", 1), ("warmup", 5), ("finetune", 0), ("finetune", 3), ("finetune", 5)]
)
def test_a_crashed_run_resumes_to_the_same_result(root, whole, tmp_path, stage, update):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, stage, update)
        with pytest.raises(Crash):
            train(build_vlm(root), whole[-1], tmp_path)
    vlm = build_vlm(root)
    results = train(vlm, whole[-1], tmp_path, resume=True)
    assert_same(vlm, tmp_path, results, whole)


def test_a_run_may_crash_between_a_stages_last_update_and_the_next_stage(root, whole, tmp_path, monkeypatch):
    save = Checkpoints.save

    def crash(self, checkpoint):
        if checkpoint.optimizer is None:
            raise Crash
        save(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", crash)
    with pytest.raises(Crash):
        train(build_vlm(root), whole[-1], tmp_path)
    monkeypatch.undo()
    vlm = build_vlm(root)
    results = train(vlm, whole[-1], tmp_path, resume=True)
    assert_same(vlm, tmp_path, results, whole)


def test_stages_may_train_the_llm_in_full_and_then_by_lora(root, tmp_path):
    stages = [
        {**WARMUP, "trainable": {"projector": "full", "llm": "full"}, "lr": 1e-3, "budget": {"samples": 8}},
        {**FINETUNE, "trainable": {"projector": "full", "llm": "lora"}, "budget": {"samples": 12}},
    ]
    expected = build_vlm(root)
    train(expected, make_recipe(stages), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 1)
        with pytest.raises(Crash):
            train(build_vlm(root), make_recipe(stages), tmp_path / "cut")
    vlm = build_vlm(root)
    train(vlm, make_recipe(stages), tmp_path / "cut", resume=True)
    ours, tensors = all_tensors(vlm), all_tensors(expected)
    assert [name for name in tensors if not torch.equal(ours[name], tensors[name])] == []


def process(root: Path, run: Path, recipe: Recipe, *options: str) -> subprocess.CompletedProcess[str]:
    run.mkdir(exist_ok=True)
    (run / "recipe.json").write_text(recipe.model_dump_json())
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "LOCAL_RANK"))}
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(root), str(run), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "stage", "update", "workers"),
    [("SIGKILL", "finetune", 3, 0), ("SIGTERM", "warmup", 2, 0), ("SIGINT", "warmup", 2, 2)],
)
def test_a_killed_process_resumes_to_the_same_result(root, whole, tmp_path, name, stage, update, workers):
    """Also where others load its data: they end, too (or the pipes that they share would stay open)."""
    recipe = whole[-1]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    done = process(root, tmp_path, recipe, "--signal", stage, str(update), name)
    if name == "SIGKILL":
        assert done.returncode == -signal.SIGKILL, done.stderr
        # killed in update 4, and validated and saved after every second one
        assert Checkpoints(tmp_path / "checkpoints").load().progress.update == 2
    else:
        assert done.returncode == {"SIGTERM": 143, "SIGINT": 130}[name], done.stderr
        assert name in done.stderr
        assert "--resume" in done.stderr
        assert Checkpoints(tmp_path / "checkpoints").load().progress.update == update + 1
    assert not (tmp_path / "final0.safetensors").exists()
    vlm = build_vlm(root)
    results = train(vlm, recipe, tmp_path, resume=True)
    assert_same(vlm, tmp_path, results, whole)


def test_of_two_processes_both_stop_where_one_meets_too_many_unreadable_images(root, tmp_path):
    second = sorted(mixtures()["train"].draws(0, 0, 8)[1::2].tolist())  # what the second process gets
    recipe = make_recipe(
        [{**WARMUP, "cache_features": False}],
        data=data_keys(max_bad_fraction=0.15),
        trainer={"precision": "fp32", "devices": 2},
    )
    done = process(root, tmp_path, recipe, "--unreadable", *map(str, second))
    assert done.returncode == 1, done.stderr[-3000:]
    # Two of 19 are allowed; the first process itself met none.
    assert done.stderr.count("4 of 13 samples are unreadable, more than data.max_bad_fraction = 0.15 allows of 19") == 1
    assert sorted(line["id"] for line in lines(tmp_path / "quarantine.jsonl")) == [f"s0-{row:02d}" for row in second]


# --- checkpoints --------------------------------------------------------------------------------


def written(directory: Path, *updates: int) -> Checkpoints:
    checkpoints = Checkpoints(directory)
    for update in updates:
        state = {"projector/weight": torch.full((2, 2), float(update))}
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        checkpoints.save(Checkpoint(Progress(update=update), state=state, best_state={}, optimizer=optimizer))
    return checkpoints


def test_the_last_two_checkpoints_are_kept(tmp_path):
    checkpoints = written(tmp_path, 1, 2, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00-00000002", "00-00000030"]
    loaded = checkpoints.load()
    assert loaded.progress == Progress(update=30, elapsed=loaded.progress.elapsed)
    assert torch.equal(loaded.state["projector/weight"], torch.full((2, 2), 30.0))
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], torch.ones(3))


FILES = ["state.safetensors", "best.safetensors", "optimizer.pt", "progress.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    checkpoints = written(tmp_path, 1, 2)
    file = tmp_path / "00-00000002" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content[:-2] + b"\x01\x02")
    assert checkpoints.load().progress.update == 1


def test_checkpoints_that_are_all_damaged_are_named(tmp_path):
    checkpoints = written(tmp_path, 1, 2)
    for directory in tmp_path.iterdir():
        (directory / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)00-00000002.*state\.safetensors.*00-00000001"):
        checkpoints.load()
    assert Checkpoints(tmp_path / "none").load() is None


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_result(root, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 5)
        with pytest.raises(Crash):
            train(build_vlm(root), whole[-1], tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "state.safetensors").write_bytes((newest / "state.safetensors").read_bytes()[:-1] + b"!")
    vlm = build_vlm(root)
    results = train(vlm, whole[-1], tmp_path, resume=True)
    assert_same(vlm, tmp_path, results, whole)


def test_a_checkpoint_of_another_shape_is_refused_by_name(root, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 3)
        with pytest.raises(Crash):
            train(build_vlm(root), make_recipe(), tmp_path)
    other = make_recipe([WARMUP, {**FINETUNE, "lora": {"rank": 4}}])
    with pytest.raises(CheckpointError, match=r"llm.*lora_A.*must be \[4, "):
        train(build_vlm(root), other, tmp_path, resume=True)


def test_a_half_written_line_of_the_log_is_dropped(root, whole, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 3)
        with pytest.raises(Crash):
            train(build_vlm(root), whole[-1], tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"stage": "finetune", "upd')
    vlm = build_vlm(root)
    results = train(vlm, whole[-1], tmp_path, resume=True)
    assert_same(vlm, tmp_path, results, whole)


def test_left_overs_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".00-00000001.77.tmp").mkdir(parents=True)
    written(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["00-00000001"]
    shutil.rmtree(tmp_path)
    assert json.loads(json.dumps(Progress().stage_start)) == {"samples": 0, "text_tokens": 0, "seconds": 0.0}


# --- signals ------------------------------------------------------------------------------------


def test_a_first_signal_is_noted_and_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        with pytest.raises(Stopped):
            stop.check()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
