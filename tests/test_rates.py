"""`lr: auto`: the range test before a stage, what it leaves behind and what it costs."""

import math
import os
import signal
from itertools import pairwise

import pytest
import torch
from test_guard import run_damaged
from test_resume import CLOCKED, Crash, crash_at
from tiny_training import FINETUNE, WARMUP, all_tensors, build_vlm, lines, make_recipe, train

from vpgtrans.errors import RecipeError
from vpgtrans.recipe import dump, load_recipe
from vpgtrans.runs.compare import compare
from vpgtrans.training import rates
from vpgtrans.training.checkpoints import Checkpoints
from vpgtrans.training.config import Stage

STAGES = [{**WARMUP, "lr": "auto"}, {**FINETUNE, "lr": "auto"}]


@pytest.fixture
def short(monkeypatch):
    """Eight updates are enough here."""
    monkeypatch.setattr(rates, "UPDATES", 8)


def test_auto_is_a_third_form_of_a_rate_and_is_open_until_it_is_picked(tmp_path):
    recipe = make_recipe(STAGES)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    stage = recipe.stages[0]
    assert (stage.lr, stage.rates) == ("auto", {})
    assert rates.resolved(stage, 3e-3).rates == {"projector": 3e-3}
    with pytest.raises(
        RecipeError, match=r"is the text 'fast'; right would be a number above 0 and at most 10, .* auto"
    ):
        make_recipe([{**WARMUP, "lr": "fast"}])


def test_rates_grow_by_one_factor():
    grown = [rates.rate_at(update) for update in range(rates.UPDATES)]
    assert (grown[0], grown[-1]) == (rates.LOWEST, pytest.approx(rates.HIGHEST))
    assert [b / a for a, b in pairwise(grown)] == pytest.approx([grown[1] / grown[0]] * 39)


@pytest.mark.parametrize(
    ("gains", "picked"),
    [
        ([0, 0, -1, -2, -3, -3, -3, -3, 0, 5], 1e-5 * 10**1.6),  # where the fall ends, not somewhere on the plateau
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1e-5),
        ([0, 1, 2, 3], 1e-5),
    ],
)
def test_the_rate_is_taken_where_the_fall_ends(monkeypatch, gains, picked):
    monkeypatch.setattr(rates, "WINDOW", 1)
    grown = [1e-5 * 10 ** (0.4 * place) for place in range(len(gains))]
    assert rates.pick(grown, gains) == pytest.approx(picked, rel=0.02)


def test_means_are_over_as_many_on_both_sides():
    assert rates.smooth([0.0, 3.0, 6.0, 9.0, 12.0, 100.0]) == [0, 3, 6, 26, 40 + 1 / 3, 100]


def test_a_stage_with_the_rate_picked_ends_as_one_that_states_it(root, tmp_path, short):
    found = build_vlm(root)
    results = train(found, make_recipe(STAGES), tmp_path / "auto")
    picked = [result.range_test["rate"] for result in results]
    stated = build_vlm(root)
    plain = [{**stage, "lr": rate} for stage, rate in zip(STAGES, picked, strict=True)]
    others = train(stated, make_recipe(plain), tmp_path / "stated")
    ours, theirs = all_tensors(found), all_tensors(stated)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert [result.val_loss for result in results] == [result.val_loss for result in others]
    assert [result.range_test for result in others] == [None, None]
    for result, other in zip(results, others, strict=True):
        assert (result.samples, result.updates) == (other.samples, other.updates)
        test = result.range_test
        assert (test["updates"], test["samples"]) == (8, 32)
        assert test["gains"][0] == 0  # the same samples, before anything was trained
        assert all(math.isfinite(gain) for gain in test["gains"])
        assert 0 < test["seconds"] < result.seconds
    log = [line for line in lines(tmp_path / "auto/metrics.jsonl") if "picked_lr" in line]
    assert [(line["stage"], line["picked_lr"]) for line in log] == list(
        zip(["warmup", "finetune"], picked, strict=True)
    )
    shown = [row for row in (tmp_path / "auto/trainable.json").read_text().split("}") if '"projector"' in row]
    assert [f'"lr": {rate}' in row for row, rate in zip(shown, picked, strict=True)] == [True, True]


@pytest.mark.parametrize(("stage", "update"), [("warmup", 4), ("finetune", 3)])
def test_a_resumed_run_does_not_test_again(root, tmp_path, short, stage, update):
    recipe, expected = make_recipe(STAGES), build_vlm(root)
    results = train(expected, recipe, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, stage, update)
        patch.setattr(rates._SweepModule, "training_step", STEP)
        with pytest.raises(Crash):
            train(build_vlm(root), recipe, tmp_path / "cut")
    tested: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        count_tests(patch, tested)
        vlm = build_vlm(root)
        others = train(vlm, recipe, tmp_path / "cut", resume=True)
    assert tested == (["finetune"] if stage == "warmup" else [])
    log = [without_times(line) for line in lines(tmp_path / "whole/metrics.jsonl")]
    assert [without_times(line) for line in lines(tmp_path / "cut/metrics.jsonl")] == log
    assert [without_times({"range_test": r.range_test}) for r in others] == [
        without_times({"range_test": r.range_test}) for r in results
    ]
    ours, theirs = all_tensors(vlm), all_tensors(expected)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


STEP = rates._SweepModule.training_step


def count_tests(patch: pytest.MonkeyPatch, tested: list[str]) -> None:
    pick = rates.pick_rate

    def counted(run):
        tested.append(run.stage.name)
        return pick(run)

    patch.setattr("vpgtrans.training.fit.pick_rate", counted)


def without_times(line: dict) -> dict:
    kept = {key: value for key, value in line.items() if key not in CLOCKED}
    if kept.get("range_test"):
        kept["range_test"] = {key: value for key, value in kept["range_test"].items() if key != "seconds"}
    return kept


def test_a_test_ends_where_the_loss_diverges(root, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "UPDATES", 12)
    monkeypatch.setattr(rates, "WORSE", -100.0)  # whatever comes second counts as far above
    (result,) = train(build_vlm(root), make_recipe(STAGES[:1]), tmp_path)
    assert (result.range_test["updates"], len(result.range_test["gains"])) == (2, 2)


def test_what_is_not_finite_before_anything_was_trained_says_nothing_of_the_rate(root, tmp_path, short):
    recipe = make_recipe([{**STAGES[0], "batch_size": 2, "budget": {"samples": 4}}])
    _, (result,) = run_damaged(root, tmp_path, recipe)
    test = result.range_test
    assert 0 < len(test["gains"]) < 8
    assert (test["updates"], all(math.isfinite(gain) for gain in test["gains"])) == (8, True)


def test_without_a_curve_the_rate_is_the_lowest():
    assert rates.pick([], []) == rates.LOWEST


@pytest.mark.parametrize(("name", "measured", "saved"), [("SIGTERM", 1, None), ("SIGUSR1", 8, 1)])
def test_a_signal_while_losses_are_measured_does_not_wait_for_the_test(
    root, tmp_path, short, monkeypatch, name, measured, saved
):
    loss, calls, found = rates._loss, [], []

    def one(*arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.Signals[name])
        return loss(*arguments)

    monkeypatch.setattr(rates, "_loss", one)
    save = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, state: (found.append(state.progress.update), save(self, state))
    )
    recipe = make_recipe([{**STAGES[0], "validate_every": 24}])
    if saved is None:
        with pytest.raises(Exception, match="stopped by SIGTERM; there is no checkpoint yet"):
            train(build_vlm(root), recipe, tmp_path)
    else:
        train(build_vlm(root), recipe, tmp_path)
        assert found[0] == saved
    assert len(calls) == measured


def test_compare_wants_a_number(root):
    with pytest.raises(RecipeError, match=r"stages\.warmup\.lr: auto: compare counts every sample"):
        compare(make_recipe(STAGES))


def test_stages_without_a_rate_have_the_default():
    stage = Stage.model_validate({"name": "a", "trainable": {"projector": "full"}, "budget": {"samples": 8}})
    assert stage.rates == {"projector": 5e-4}
