"""Updates that would harm are skipped and recorded, too many stop the run; stages that no longer improve end early."""

import json
import math
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from test_resume import Crash as Killed
from test_resume import assert_same, crash_at, process
from tiny_training import (
    FINETUNE,
    WARMUP,
    Pictures,
    all_tensors,
    build_vlm,
    damaged,
    lines,
    make_recipe,
    mixtures,
    train,
)

from vpgtrans.data.mixture import Mixture
from vpgtrans.errors import TrainingError
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.runs.training import run_stages
from vpgtrans.training.config import GuardConfig
from vpgtrans.training.guard import ENOUGH, WINDOW, Guard
from vpgtrans.training.loading import Validator
from vpgtrans.training.module import StageModule

CURVES = json.loads((Path(__file__).parent / "data" / "losses.json").read_text())
"""Training losses of real runs in which nothing was wrong."""


# --- what is a spike ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVES)
def test_real_curves_in_which_nothing_is_wrong_raise_no_alarm(name):
    guard = Guard()
    assert [guard.problem(loss, 1.0) for loss in CURVES[name]] == [None] * len(CURVES[name])
    assert len(CURVES[name]) >= 100


@pytest.mark.parametrize("name", CURVES)
def test_a_spike_in_a_real_curve_is_found_and_leaves_no_trace(name):
    guard, without = Guard(), Guard()
    for place, loss in enumerate(CURVES[name]):
        if place == 80:
            assert "a spike" in guard.problem(4 * max(CURVES[name][60:80]), 1.0)
        assert guard.problem(loss, 1.0) is None
        without.problem(loss, 1.0)
    assert guard.state == without.state


def test_the_first_losses_are_no_spikes_and_a_level_curve_needs_a_real_rise():
    guard = Guard(GuardConfig(spike=5))
    assert [guard.problem(loss, 1.0) for loss in [1.0, 50.0] * (ENOUGH // 2)] == [None] * ENOUGH
    level = Guard(GuardConfig(spike=5))
    for _ in range(WINDOW):
        level.problem(2.0, 1.0)
    assert level.problem(2.19, 1.0) is None  # five times a fiftieth
    assert "5.5 deviations above the last ones' median, 2" in level.problem(2.22, 1.0)
    assert Guard(GuardConfig(spike=None)).problem(1e9, 1.0) is None


def test_where_data_are_known_by_heart_small_losses_are_no_spikes():
    guard, chance = Guard(), random.Random(0)
    for _ in range(WINDOW):
        assert guard.problem(0.002 + chance.random() / 1000, 1.0) is None
    assert guard.problem(0.08, 1.0) is None
    assert "a spike" in guard.problem(0.5, 1.0)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_found_at_once(loss, norm):
    assert Guard(GuardConfig(spike=None)).problem(loss, norm)


def test_the_state_goes_through_json_to_the_same_decisions():
    chance, guard = random.Random(0), Guard(GuardConfig(spike=3), stage="warmup")
    losses = [chance.gauss(2, 0.1) + (chance.random() < 0.05) for _ in range(400)]
    halves: list[list[str | None]] = [[], []]
    other = Guard(guard.config)
    for place, loss in enumerate(losses):
        if place == 200:
            other.resume(json.loads(json.dumps(guard.state)), same_stage=True)
        halves[0].append(guard.problem(loss, 1.0))
        if place >= 200:
            halves[1].append(other.problem(loss, 1.0))
    assert halves[0][200:] == halves[1]
    assert any(halves[1])


# --- in a run -----------------------------------------------------------------------------------


def run_damaged(root, run, recipe, **options):
    vlm = damaged(build_vlm(root))
    run.mkdir(exist_ok=True)
    sources = {**mixtures(), "validation": Mixture([(Pictures(3, seed=1), 1.0)])}  # none has a helmet
    return vlm, run_stages(vlm, recipe, RunDirectory(run), **{"resume": False, **options}, **sources)


def guarded(**changes):
    small = {**WARMUP, "batch_size": 2, "budget": {"samples": 24}}
    later = {**FINETUNE, "batch_size": 2, "budget": {"samples": 24}}
    return make_recipe([small, later], trainer={"precision": "fp32", "devices": 1, "guard": changes})


def test_updates_of_bad_data_are_skipped_recorded_and_change_nothing(root, tmp_path, monkeypatch):
    before: dict[int, dict[str, torch.Tensor]] = {}
    step = StageModule.training_step

    def training_step(self, batch, batch_idx):
        if self.stage.name == "warmup":
            before[self.done] = all_tensors(self.vlm)
        step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", training_step)
    vlm, results = run_damaged(root, tmp_path, guarded(max_skipped=20))
    log = lines(tmp_path / "metrics.jsonl")
    skipped = [line for line in log if "skipped" in line]
    helmets = {name for name, caption in zip(*(getattr(Pictures(14), key) for key in ("ids", "captions")), strict=True)
               if "helmet" in caption}  # fmt: skip
    assert skipped
    assert all(helmets & set(line["ids"]) and line["skipped_loss"] is None for line in skipped)
    assert skipped[0]["skipped"] == "the loss is nan"
    trained = [line for line in log if "loss" in line]
    assert len(trained) + len(skipped) == 24  # all of them count against the budget
    assert all(math.isfinite(line["loss"]) for line in trained)
    assert [(result.updates, result.samples) for result in results] == [(12, 24), (12, 24)]
    assert sum(result.skipped for result in results) == len(skipped)
    assert all(tensor.isfinite().all() for name, tensor in all_tensors(vlm).items() if "projector" in name)
    for line in skipped:
        if line["stage"] == "warmup" and line["update"] < 12:
            after = before[line["update"]]
            assert all(torch.equal(after[name], tensor) for name, tensor in before[line["update"] - 1].items())


def test_a_run_that_was_interrupted_after_a_skipped_update_ends_the_same(root, tmp_path):
    recipe = guarded(max_skipped=20)
    vlm, results = run_damaged(root, tmp_path / "whole", recipe)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, "finetune", 9)
        with pytest.raises(Killed):
            run_damaged(root, tmp_path / "cut", recipe)
    assert any("skipped" in line for line in lines(tmp_path / "cut/metrics.jsonl"))
    again, others = run_damaged(root, tmp_path / "cut", recipe, resume=True)
    assert_same(
        again, tmp_path / "cut", others, (all_tensors(vlm), lines(tmp_path / "whole/metrics.jsonl"), results, 0)
    )
    assert [result.skipped for result in others] == [result.skipped for result in results]


def test_skipped_updates_count_on_over_stages_where_no_checkpoint_is_written(root, tmp_path):
    _, results = run_damaged(root, tmp_path / "all", guarded(max_skipped=20))
    first, second = (result.skipped for result in results)
    assert min(first, second) > 0
    with pytest.raises(TrainingError, match=f"{first} updates were skipped before"):
        run_damaged(root, tmp_path / "few", guarded(max_skipped=first), keep_checkpoints=False)


def test_too_many_skipped_updates_stop_the_run_and_name_the_samples(root, tmp_path):
    with pytest.raises(TrainingError) as caught:
        run_damaged(root, tmp_path, guarded(max_skipped=2))
    message = str(caught.value)
    assert "the loss is nan, and 2 updates were skipped before, as many as trainer.guard.max_skipped allows" in message
    assert "the batch held s0-" in message
    assert len([line for line in lines(tmp_path / "metrics.jsonl") if "skipped" in line]) == 2


class OneOdd(Pictures):
    """Of many pictures that are easy to learn, one that says something else altogether."""

    def __init__(self, odd: int | None = None):
        self.odd = odd
        super().__init__(160)

    def sample(self, row):
        found = super().sample(row)
        return type(found)(**{**vars(found), "text": "zqxj 7#! vv<<"}) if row == self.odd else found


def test_a_spike_in_training_is_skipped(root, tmp_path):
    stage = {**WARMUP, "trainable": {"projector": "full", "llm": "full"}, "budget": {"samples": 160}, "lr": 2e-2,
             "validate_every": 160, "cache_features": False}  # fmt: skip
    recipe = make_recipe([stage], trainer={"precision": "fp32", "devices": 1, "guard": {"spike": 4}})
    place = 4 * 35 + 1
    odd = int(mixture_of(OneOdd()).draws(0, place, place + 1)[0])
    sources = {"train": mixture_of(OneOdd(odd)), "validation": mixtures()["validation"]}
    results = run_stages(build_vlm(root), recipe, RunDirectory(tmp_path), resume=False, **sources)
    (line,) = [line for line in lines(tmp_path / "metrics.jsonl") if "skipped" in line]
    assert (line["update"], results[0].skipped) == (36, 1)
    assert "a spike" in line["skipped"]
    assert f"s0-{odd:02d}" in line["ids"]


def mixture_of(source) -> Mixture:
    return Mixture([(source, 1.0)])


def test_two_processes_skip_the_same_updates(root, tmp_path):
    recipe = guarded(max_skipped=20)
    both = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"devices": 2, "strategy": "ddp"})})
    (tmp_path / "options.json").write_text(json.dumps({"damaged": True}))
    done = process(root, tmp_path, both, "--dropout", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    log = lines(tmp_path / "metrics.jsonl")
    skipped = [line for line in log if "skipped" in line]
    assert skipped
    assert all(len(line["ids"]) == 2 for line in skipped)  # of both
    first, second = (json.loads((tmp_path / f"results{rank}.json").read_text()) for rank in (0, 1))
    assert first == second


# --- early stopping -----------------------------------------------------------------------------


def validating(patch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Validations of the warm-up come to these values; resumed runs go on at theirs."""
    call = Validator.__call__

    def said(self, module, **keywords):
        real = call(self, module, **keywords)
        return losses[module.done // 2] if module.stage.name == "warmup" else real

    patch.setattr(Validator, "__call__", said)


LOSSES = [3.0, 2.0, 1.5, 1.45, 1.6, 1.49, 1.0, 0.9]


def stopping(**rule):
    warmup = {**WARMUP, "budget": {"samples": 56}, "early_stopping": rule or None}
    return make_recipe([warmup, {**FINETUNE, "budget": {"samples": 8}}])


@pytest.mark.parametrize(
    ("rule", "updates", "best"),
    [
        ({}, 14, 0.9),
        ({"patience": 2}, 10, 1.45),
        ({"patience": 2, "min_delta": 0.1}, 8, 1.45),
        ({"patience": 3}, 14, 0.9),
    ],
)
def test_a_stage_ends_early_with_its_best_state(root, tmp_path, monkeypatch, rule, updates, best):
    validating(monkeypatch, LOSSES)
    first, second = train(build_vlm(root), stopping(**rule), tmp_path)
    assert (first.updates, first.samples, first.val_loss) == (updates, 4 * updates, best)
    assert first.stopped_early == (updates < 14)
    assert (second.updates, second.stopped_early) == (2, False)
    log = lines(tmp_path / "metrics.jsonl")
    assert [line["samples"] for line in log if line["stage"] == "finetune"][-1] == 4 * updates + 8


def killed(*_):
    raise Killed


@pytest.mark.parametrize("update", [5, 9, "end"])
def test_an_interrupted_stage_ends_early_at_the_same_update(root, tmp_path, monkeypatch, update):
    validating(monkeypatch, LOSSES)
    recipe, expected = stopping(patience=2), build_vlm(root)
    results = train(expected, recipe, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        if update == "end":  # between the stage's end and the next one's begin
            patch.setattr("vpgtrans.training.fit.span_peak", killed)
        else:
            crash_at(patch, "warmup", update)
        with pytest.raises(Killed):
            train(build_vlm(root), recipe, tmp_path / "cut")
    vlm = build_vlm(root)
    others = train(vlm, recipe, tmp_path / "cut", resume=True)
    assert others[0].stopped_early
    assert_same(
        vlm, tmp_path / "cut", others, (all_tensors(expected), lines(tmp_path / "whole/metrics.jsonl"), results, 0)
    )


def test_a_validation_that_a_signal_cut_short_ends_the_stage_when_it_is_made_up_for(root, tmp_path, monkeypatch):
    validating(monkeypatch, LOSSES)
    recipe, expected = stopping(patience=2), build_vlm(root)
    whole = train(expected, recipe, tmp_path / "whole")
    module_losses = StageModule.losses

    def losses(self, batch):
        if self.stage.name == "warmup" and self.done == 10 and not self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return module_losses(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "losses", losses)
        with pytest.raises(Exception, match="stopped by SIGTERM"):
            train(build_vlm(root), recipe, tmp_path / "cut")
    vlm = build_vlm(root)
    results = train(vlm, recipe, tmp_path / "cut", resume=True)
    assert [result.updates for result in results] == [result.updates for result in whole] == [10, 2]
    ours, theirs = all_tensors(vlm), all_tensors(expected)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
