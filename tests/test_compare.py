"""`compare` on tiny models: same samples for all arms, the summary's keys, resuming, and the speed-ups' arithmetic."""

import importlib
import json
import math
import shutil
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import WARMUP, Tiny, source_keys

from vpgtrans import runs
from vpgtrans.errors import OutputError, RecipeError
from vpgtrans.recipe import CompareConfig, Recipe, load_recipe, parse_recipe
from vpgtrans.runs.compare import arm_recipe, speedups
from vpgtrans.training.samples import Samples

COMPARE = importlib.import_module("vpgtrans.runs.compare")
"""The module: `runs.compare` is the verb."""


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def without_prompt(recipe: Recipe) -> Recipe:
    """A stored recipe as it was before the source's prompt was written out."""
    assert recipe.prompt is not None
    return recipe.model_copy(update={"prompt": None})


@pytest.fixture(scope="module")
def compared(tiny: Tiny) -> tuple[Recipe, Path, dict[str, list[list[str]]]]:
    """A comparison, and the sample ids of every training batch of each of its arms."""
    batches: dict[str, list[list[str]]] = {}
    finish = Samples.finish

    def record(self: Samples, loaded: Any, **options: Any) -> Any:
        batch = finish(self, loaded, **options)
        if len(self.mixture) == 24:  # training, not validation
            batches.setdefault(current[-1], []).append(batch.ids)
        return batch

    module = COMPARE
    current: list[str] = []
    recipe_of = module.arm_recipe

    def note(recipe: Recipe, arm: str, *, seed: int, factor: float) -> Recipe:
        current.append(f"{arm}-{seed}-{factor:g}")
        return recipe_of(recipe, arm, seed=seed, factor=factor)

    recipe = tiny.transfer_recipe(compare={"seeds": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Samples, "finish", record)
        patch.setattr(module, "arm_recipe", note)
        runs.compare(recipe, output=tiny.root / "compared", device="cpu")
    return recipe, tiny.root / "compared", batches


def test_all_arms_see_the_same_samples_in_the_same_order(compared: Any) -> None:
    _, _, batches = compared
    assert len(batches) == 7, "three arms, two seeds; inherit tries two rates on the first seed"
    for seed in ("0", "1"):
        orders = [value for name, value in batches.items() if name.split("-")[1] == seed]
        assert len(orders) == (4 if seed == "0" else 3)
        flat = [[name for ids in order for name in ids] for order in orders]
        assert all(order == flat[0] for order in flat)
        assert len(flat[0]) == 32
    assert batches["transfer-0-1"] != batches["transfer-1-1"]


def test_the_comparisons_summary_has_the_designs_keys(compared: Any) -> None:
    _, path, _ = compared
    summary = read(path / "summary.json")
    assert list(summary["arms"]) == ["scratch", "inherit", "transfer"]
    for name, arm in summary["arms"].items():
        assert set(arm) == {
            "val_loss", "final_val_loss", "curve", "curves", "seconds", "lr_factor", "initialiser",
        }  # fmt: skip
        assert len(arm["val_loss"]) == len(arm["curves"]) == len(arm["seconds"]) == 2
        assert arm["val_loss"] == [min(loss for _, loss in curve) for curve in arm["curves"]]
        assert [samples for samples, _ in arm["curve"]] == [0, 8, 16, 24, 32], "every arm has the whole budget"
        for samples, loss in arm["curve"]:
            assert loss == median(dict(map(tuple, curve))[samples] for curve in arm["curves"])
        assert arm["lr_factor"] in ((1.0, 2.0) if name == "inherit" else (1.0,))
    assert summary["arms"]["scratch"]["initialiser"] == "random"
    assert summary["arms"]["transfer"]["initialiser"].startswith("ridge")
    assert set(summary["speedup"]) == {"inherit", "transfer"}
    assert set(summary["speedup_over_inherit"]) == {"scratch", "transfer"}
    for ratio in summary["speedup"].values():
        assert ratio is None or set(ratio) >= {"median", "min", "max"}
    curves = {name: [[tuple(point) for point in c] for c in arm["curves"]] for name, arm in summary["arms"].items()}
    assert summary["speedup"] == speedups(curves, "scratch", floor=4)
    assert set(summary["definitions"]) == set(summary["arms"])
    assert summary["budget"] == {"samples": 32}
    assert (path / "report.html").exists()
    assert (path / "curves.png").exists()


def test_packed_seeds_have_a_common_curve_though_their_updates_hold_other_numbers(tiny: Tiny, tmp_path: Path) -> None:
    texts = ["a cat", "a white cat on a red sofa"]
    rows = [{"image": "a.png", "caption": texts[row % 3 == 0]} for row in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    train = [{"dataset": str(tmp_path / "rows.jsonl")}]
    recipe = tiny.transfer_recipe(data={**tiny.data(), "train": train, "packing": {"max_tokens": 34}})
    arm = runs.compare(recipe, arms=["scratch"], seeds=2, output=tmp_path / "run", device="cpu")["arms"]["scratch"]
    first, second = ([samples for samples, _ in curve] for curve in arm["curves"])
    assert first[1:-1] != second[1:-1]
    assert [samples for samples, _ in arm["curve"]] == sorted(
        {samples for samples in first + second if samples <= min(first[-1], second[-1])}
    )
    starts = [curve[0][1] for curve in arm["curves"]]
    assert arm["curve"][0] == [0, pytest.approx(sum(starts) / 2)]


def test_the_first_seeds_better_rate_counts_and_serves_the_others(compared: Any) -> None:
    _, path, _ = compared
    tried = [read(path / "arms" / f"inherit-seed0-lr{factor}" / "result.json") for factor in (1, 2)]
    best = min(tried, key=lambda result: min(loss for _, loss in result["curve"]))
    summary = read(path / "summary.json")["arms"]["inherit"]
    assert summary["lr_factor"] == best["lr_factor"]
    assert summary["curves"][0] == best["curve"]
    assert {p.name for p in (path / "arms").glob("inherit-seed1*")} == {f"inherit-seed1-lr{best['lr_factor']:g}"}


def test_a_resumed_comparison_keeps_finished_arms(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = COMPARE
    recipe, path, _ = compared
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    before = read(copy / "summary.json")
    (copy / "summary.json").unlink()
    (copy / "arms" / "inherit-seed1-lr2" / "result.json").unlink(missing_ok=True)
    (copy / "arms" / "inherit-seed1-lr1" / "result.json").unlink(missing_ok=True)
    trained: list[Path] = []
    run_stages = module.run_stages

    def record(vlm: Any, recipe: Any, run: Any, **options: Any) -> Any:
        trained.append(run.path)
        return run_stages(vlm, recipe, run, **options)

    monkeypatch.setattr(module, "run_stages", record)
    after = runs.compare(recipe, output=copy, resume=True, device="cpu")
    assert [where.name.rsplit("-", 1)[0] for where in trained] == ["inherit-seed1"]
    for arm in after["arms"].values():
        arm.pop("seconds")
    for arm in before["arms"].values():
        arm.pop("seconds")
    assert json.loads(json.dumps(after)) == before


def test_a_resumed_comparison_may_have_other_arms_seeds_and_rates_and_nothing_else(
    compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, path, _ = compared
    first = read(path / "summary.json")
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    trained: list[str] = []
    run_stages = COMPARE.run_stages

    def record(vlm: Any, recipe: Any, run: Any, **options: Any) -> Any:
        trained.append(run.path.name)
        return run_stages(vlm, recipe, run, **options)

    monkeypatch.setattr(COMPARE, "run_stages", record)
    more = recipe.model_copy(
        update={"compare": CompareConfig(arms=["scratch", "random", "transfer"], seeds=3, lr_factors=[1.0])}
    )
    other = more.model_copy(update={"seed": 1})
    with pytest.raises(OutputError, match=r"\(differs in seed\); .* but for compare\.arms, compare\.seeds, "):
        runs.compare(other, output=copy, resume=True, device="cpu")
    assert without_prompt(load_recipe(copy / "recipe.yaml")) == recipe
    summary = runs.compare(more, output=copy, resume=True, device="cpu")
    assert trained == ["scratch-seed2-lr1", "random-seed0", "random-seed1", "random-seed2", "transfer-seed2"]
    assert without_prompt(load_recipe(copy / "recipe.yaml")) == more
    assert (list(summary["arms"]), summary["seeds"]) == (["scratch", "random", "transfer"], 3)
    for arm in ("scratch", "transfer"):
        assert summary["arms"][arm]["val_loss"][:2] == first["arms"][arm]["val_loss"]
        assert len(summary["arms"][arm]["val_loss"]) == 3


def test_scratch_and_inherit_put_the_whole_budget_into_the_fine_tune(tiny: Tiny) -> None:
    recipe = tiny.transfer_recipe()
    for arm in ("scratch", "inherit"):
        (stage,) = arm_recipe(recipe, arm, seed=3, factor=2.0).stages
        assert (stage.name, stage.budget.samples, stage.lr) == ("finetune", 32, 2e-3)
        assert stage.trainable == recipe.stages[-1].trainable
    assert arm_recipe(recipe, "scratch", seed=3, factor=1.0).initialiser.kind == "random"
    assert arm_recipe(recipe, "transfer", seed=3, factor=1.0) == recipe.model_copy(update={"seed": 3})
    named = arm_recipe(recipe, "caption-fit", seed=0, factor=1.0)
    assert (named.initialiser.kind, named.initialiser.fit, named.stages) == ("caption-fit", "ridge", recipe.stages)


def test_scratch_has_a_connector_of_its_own(tiny: Tiny) -> None:
    from vpgtrans.runs.parts import fresh_connector, open_source

    source = open_source(str(tiny.source), seed=0)
    fresh, again = (fresh_connector(source.vpg, seed=0) for _ in range(2))
    pairs = [(fresh.connector.state_dict()[k], v) for k, v in source.vpg.connector.state_dict().items() if v.ndim > 1]
    assert pairs
    assert not any(torch.equal(mine, trained) for mine, trained in pairs)
    assert fresh.encoder is source.vpg.encoder
    for name, tensor in fresh.connector.state_dict().items():
        assert torch.equal(tensor, again.connector.state_dict()[name])


def test_scratch_keeps_what_was_measured_of_the_encoder(tiny: Tiny, tmp_path: Path) -> None:
    from vpgtrans.runs.parts import fresh_connector, open_source

    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    keys["source"]["vpg"]["connector"] = keys["source"]["vpg"]["connector"] | {"standardised": True}
    runs.train(parse_recipe(keys), output=tmp_path / "source", device="cpu")
    trained = open_source(str(tmp_path / "source"), seed=0).vpg
    fresh = fresh_connector(trained, seed=0)
    for name in ("mean", "deviation"):
        assert trained.connector.get_buffer(name).std() > 0
        assert torch.equal(fresh.connector.get_buffer(name), trained.connector.get_buffer(name))
    assert not torch.equal(fresh.connector.queries, trained.connector.queries)


def test_a_curve_holds_losses_at_the_last_stages_resolution_alone(tiny: Tiny, tmp_path: Path) -> None:
    keys = tiny.transfer_keys()
    keys["stages"][0]["visual_tokens"] = 2
    found = runs.compare(parse_recipe(keys), arms=["transfer"], seeds=1, output=tmp_path / "run", device="cpu")
    lines = (tmp_path / "run" / "arms" / "transfer-seed0" / "metrics.jsonl").read_text().splitlines()
    sharp = [line for line in map(json.loads, lines) if "val_loss" in line and line["stage"] == "finetune"]
    assert found["arms"]["transfer"]["curves"] == [[(line["samples"], line["val_loss"]) for line in sharp]]
    assert sharp[0]["samples"] == 16


def test_compare_names_what_it_can_not_compare(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.transfer_recipe()
    with pytest.raises(RecipeError, match="no arm sideways; known: scratch"):
        runs.compare(recipe, arms=["sideways"], output=tmp_path / "run")
    tokens = tiny.transfer_recipe(stages=[WARMUP | {"budget": {"tokens": 100}}])
    with pytest.raises(RecipeError, match="budget"):
        runs.compare(tokens, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- speed-ups ----------------------------------------------------------------------------------


def test_a_speed_up_is_scratchs_samples_over_the_arms() -> None:
    scratch = [[(0, 5.0), (100, 3.0), (200, 2.0), (300, 2.5)], [(0, 5.0), (100, 4.0), (200, 3.0), (300, 2.0)]]
    transfer = [[(0, 4.0), (50, 2.0), (100, 1.0)], [(0, 4.0), (50, 3.0), (100, 1.9)]]
    # seed 0: scratch's best 2.0 at 200, reached at 50. seed 1: 2.0 at 300, reached at 100
    found = speedups({"scratch": scratch, "transfer": transfer}, "scratch")
    assert found == {"transfer": {"median": 3.5, "min": 3.0, "max": 4.0, "per_seed": [4.0, 3.0]}}


def test_an_arm_that_never_gets_there_is_null() -> None:
    scratch = [[(0, 5.0), (100, 2.0)]] * 3
    never, once = [(0, 4.0), (100, 2.1)], [(0, 4.0), (50, 2.0), (100, 2.0)]
    assert speedups({"scratch": scratch, "x": [never] * 3}, "scratch") == {"x": None}
    assert speedups({"scratch": scratch, "x": [never, once, never]}, "scratch") == {"x": None}
    found = speedups({"scratch": scratch, "x": [once, once, never]}, "scratch")["x"]
    assert found == {"median": 2.0, "min": None, "max": 2.0, "per_seed": [2.0, 2.0, None]}


def test_an_arm_that_starts_there_counts_with_one_batch() -> None:
    curves = {"scratch": [[(0, 5.0), (160, 2.0)]], "x": [[(0, 1.0), (160, 0.5)]]}
    found = speedups(curves, "scratch", floor=16)["x"]
    assert found is not None
    assert found["median"] == 10.0


def test_without_the_base_there_is_no_speed_up() -> None:
    assert speedups({"transfer": [[(0, 1.0)]]}, "scratch") == {}


LOSSES = st.floats(min_value=0.1, max_value=10, allow_nan=False)
CURVES = st.lists(
    st.lists(LOSSES, min_size=2, max_size=6).map(lambda ys: [(100 * k, y) for k, y in enumerate(ys)]),
    min_size=1, max_size=5,
)  # fmt: skip


@given(CURVES)
def test_an_arm_against_itself_gains_nothing(runs_: list[list[tuple[int, float]]]) -> None:
    found = speedups({"scratch": runs_, "same": runs_}, "scratch", floor=10)["same"]
    assert found is not None
    assert found["per_seed"] == [1.0] * len(runs_)


@given(CURVES, st.data())
def test_a_lower_curve_is_never_slower(runs_: list[list[tuple[int, float]]], data: st.DataObject) -> None:
    lower = [[(s, y - data.draw(st.floats(0, 0.05))) for s, y in run] for run in runs_]
    found = speedups({"scratch": runs_, "lower": lower}, "scratch", floor=10)["lower"]
    assert found is not None
    assert all(ratio >= 1 for ratio in found["per_seed"])
    assert found["min"] <= found["median"] <= found["max"]
    assert math.isfinite(found["max"])


@given(CURVES, st.integers(2, 9))
def test_twice_the_samples_halve_the_speed_up(runs_: list[list[tuple[int, float]]], times: int) -> None:
    slower = [[(s * times, y) for s, y in run] for run in runs_]
    found = speedups({"scratch": runs_, "slow": slower}, "scratch", floor=1)["slow"]
    assert found is not None
    for ratio, run in zip(found["per_seed"], runs_, strict=True):
        at_start = min(run, key=lambda point: point[1])[0] == 0
        assert ratio == pytest.approx(1.0 if at_start else 1 / times)
