"""The scripts of benchmarks/ still fit the package: their help prints, their recipes hold, their figures add up."""

import importlib
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tiny_runs import Tiny, build_tiny

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SHARED = {"functional_fit", "pair"}
"""What scripts import from beside them."""
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in SHARED)


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts find what lies beside them, and leave no module behind."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in (*SHARED, *SCRIPTS):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPGTRANS_CACHE", str(root / "cache"))
        return build_tiny(root)


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_prints_the_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {name}.py [-h]")
    assert f"python benchmarks/{name}.py" in shown  # the docstring's command


def test_ablations_are_relative_to_the_recipes_rate_and_train_the_projector_alone():
    ablations = script("ablations")
    blocks = ablations.blocks(192, 64)
    rates = [recipe.stages[0].lr for recipe in blocks["rates"].values()]
    assert rates == pytest.approx([5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2])
    for rows in blocks.values():
        for recipe in rows.values():
            (stage,) = recipe.stages
            assert [part for part, mode in stage.trainable.items() if mode != "frozen"] == ["projector"]
            assert (stage.budget.samples, recipe.trainer.validate_samples) == (192, 64)
    tuned = {(r.stages[0].batch_size, r.stages[0].lr, r.initialiser.calibrate) for r in blocks["warmup"].values()}
    assert tuned == set(ablations.TUNED)


def test_ablations_skip_what_is_there_and_take_a_changed_recipe_for_a_new_row(tmp_path, monkeypatch, capsys):
    ablations = script("ablations")
    ran = []

    def run(pair, recipe, *, train):
        ran.append(recipe.stages[0].lr)
        return [[0, 7.0], [8, 6.0 - len(ran)]] if train else [[0, 7.0]]

    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr(ablations, "Pair", lambda recipe: object())

    def call(*arguments: str) -> int:
        ran.clear()
        argv = ["ablations.py", "--only", "rates", "--threads", "1", "--output", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", [*argv, *arguments])
        ablations.main()
        return len(ran)

    assert [call(), call(), call("--samples", "8"), call("--samples", "8", "--again")] == [5, 0, 5, 5]
    assert "| 20x (0.01) | 7.00 | 1.00 |" in capsys.readouterr().out


def test_the_cache_benchmark_trains_alike_with_and_without_and_its_seconds_add_up(tiny, monkeypatch):
    warmup_cache, pair = script("warmup_cache"), script("pair")
    recipe = tiny.transfer_recipe()
    ways = {}
    for cached in (True, False):
        stage = recipe.stages[0].model_copy(update={"cache_features": cached, "augment": False})
        ways[cached] = recipe.model_copy(update={"stages": [stage]})
    opened = pair.Pair(recipe)
    found = warmup_cache.measure(opened, ways, rounds=1)
    assert found["largest_loss_difference"] < 1e-3
    assert found["fill"]["images"] == 16 + 8  # the order takes each image once; and the validation set
    cached, plain = found["rounds"]
    for played in (cached, plain):
        assert (played["updates"], played["samples"]) == (4, 16)
        assert sum(played["pieces"].values()) == pytest.approx(played["seconds"])
        assert min(played["pieces"]["backward"], played["pieces"]["llm_forward"]) > 0
    front = ("decode", "preprocess", "encoder", "connector")
    assert all(cached["pieces"][piece] == 0 < plain["pieces"][piece] for piece in front)
    assert "| … encoder | 0.000 |" in warmup_cache.table("warmup", found)


def test_the_pairs_vlms_share_nothing_that_trains(tiny):
    pair = script("pair")
    recipe = tiny.transfer_recipe()
    recipe = recipe.model_copy(update={"stages": recipe.stages[:1]})
    opened, log = pair.Pair(recipe), pair.Timeline()
    before = opened.vlm(recipe.initialiser).projector.state_dict()
    opened.stage_run(recipe, log).run()
    after = opened.vlm(recipe.initialiser).projector.state_dict()
    assert all(bool((before[name] == after[name]).all()) for name in before)
    assert [samples for samples, _ in log.curve] == [0, 8, 16]
    with pytest.raises(AssertionError, match="would change what all VLMs share"):
        opened.stage_run(tiny.transfer_recipe(stages=[{**FINETUNE}]), log)


FINETUNE = {"name": "finetune", "trainable": {"projector": "full", "llm": "lora"}, "budget": {"samples": 4}}


def test_source_vpg_counts_by_kind():
    kinds = ["tone", "words", "tone"]
    captions = ["woman pilot dark skin tone", "red flag", "man cook light skin tone"]
    written = ["woman pilot light skin tone", "red flag", "man cook light skin tone"]
    table = script("source_vpg").by_kind(kinds, captions, written)
    assert list(table) == ["tone", "words", "all"]
    assert {key: table["tone"][key] for key in ("count", "exact_match", "name", "tone")} == {
        "count": 2,
        "exact_match": 0.5,
        "name": 1,
        "tone": 0.5,
    }
    assert (table["words"]["exact_match"], table["words"]["tone"]) == (1, None)
    assert table["all"]["exact_match"] == pytest.approx(2 / 3)
