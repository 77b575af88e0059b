"""The scripts of benchmarks/ still fit the package: their help prints, their recipes hold, their figures add up."""

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import tiny_llm
from tiny_runs import Tiny, build_tiny, write_captions
from tiny_vlms import VISION

from vpgtrans.data.mixture import open_mixture
from vpgtrans.llm import open_llm

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


def test_every_side_of_the_loader_benchmark_sees_as_many_images_and_ours_is_compared_with_the_best(
    tmp_path, monkeypatch
):
    loader = script("loader")
    drawing = Image.new("RGBA", (9, 9), (200, 0, 0, 128))
    mixture = SimpleNamespace(image=lambda row: drawing)
    monkeypatch.setattr(loader, "open_mixture", lambda sources: _Drawings(mixture, sources))
    images, captions = loader.make(tmp_path, 40)
    assert all(30_000 < len(image) < 200_000 for image in images)
    monkeypatch.setattr(loader, "open_mixture", open_mixture)
    sides = loader.Sides(tmp_path, images, captions, count=64).all()
    assert len(sides) == 1 + 2 * 5
    chosen = ["bare", "ours tar 2", "webdataset tar 1", "datasets parquet 1"]
    assert [sides[name]() for name in chosen] == [64] * 4
    rounds = {name: [{"images": 10, "wall": 2.0, "cpu": 3.0}] for name in sides}
    rounds["bare"] = [{"images": 10, "wall": wall, "cpu": 1.5} for wall in (1.0, 9.0, 0.5)]
    rounds["datasets parquet 2"] = [{"images": 10, "wall": 4.0, "cpu": 2.0}]
    found = loader.summarise(rounds, cores=2)
    assert found["sides"]["ours jsonl 2"]["of_bare_times_workers"] == pytest.approx(0.25)
    assert found["sides"]["ours jsonl 1"]["bare_cpu_share"] == pytest.approx(0.5)
    assert found["ours_beside_the_best_other"]["tar 2"] == {"speed": 1.0, "cpu": pytest.approx(2 / 3)}
    assert "| tar 2 | 1.00 | 0.67 |" in loader.table(found)


class _Drawings:
    def __init__(self, mixture, sources):
        assert sources[0].dataset == "openmoji"
        self.image = mixture.image

    def __len__(self):
        return 3


def test_the_memory_benchmark_measures_what_it_says(tmp_path):
    memory = script("data_memory")
    sizes = memory.make(tmp_path, 1500)
    report = {}
    for case in memory.CASES:
        found = memory.measure(tmp_path / f"train.{case}", 320)
        assert (found["rows"], found["draws"]) == (1500, 320)
        assert found["imports"] <= found["open"] <= found["tenth"] <= found["end"]
        report[case] = found | {"file": sizes[case]}
    assert "| rows | 1,500 | 1,500 |" in memory.table(report)


def test_spoiled_captions_are_of_other_images_and_a_perfect_score_finds_them_all():
    import random

    import numpy as np

    bench = script("filter")
    captions = [f"{'word ' * (n % 5)}{n % 30}" for n in range(60)]
    wrong = bench.swapped(captions, random.Random(0))
    assert all(a != b for a, b in zip(captions, wrong, strict=True))
    assert [len(a.split()) for a in captions] == [len(b.split()) for b in wrong]

    better = {name: 1.0 if end == "high" else -1.0 for name, end in bench.VLM_SCORES.items()}
    draw = np.random.default_rng(0)
    noise = {name: draw.random(60) for name in better}
    perfect = bench.measure(
        {name: noise[name] + 10 * sign for name, sign in better.items()},
        {name: noise[name] - 10 * sign for name, sign in better.items()},
        draws=3,
    )
    chance = bench.measure(noise, noise, draws=40)
    for name in better:
        assert perfect[name] == {"recall": {"mean": 1.0, "min": 1.0, "max": 1.0}, "removed": pytest.approx(0.1)}
        assert chance[name]["recall"]["mean"] == pytest.approx(0.1, abs=0.06)
    assert perfect["union"]["recall"]["mean"] == perfect["intersection"]["recall"]["mean"] == 1.0
    assert chance["union"]["removed"] < 0.05 < 0.2 < chance["intersection"]["removed"]


def test_own_packers_of_the_packing_benchmark_hold_every_sample_and_ours_makes_the_fewest_packs():
    packing = script("packing")
    for mix in packing.MIXES:
        lengths = packing.lengths_of(mix, 400)
        own = [name for name, (package, _) in packing.PACKERS.items() if package is None]
        packs = {name: packing.play(name, lengths)["packs"] for name in own}
        assert packs["ours"] == min(packs.values())
    planned = packing.plan_many(lengths)
    assert planned["fewest"] <= planned["packs"] == packs["ours"]


def test_the_connector_benchmark_holds_every_kind_at_one_budget(tmp_path, monkeypatch, capsys):
    from typing import get_args

    from vpgtrans.config import ConnectorConfig

    bench = script("connectors")
    rows = bench.recipes(words=64, captions=32, images=8, seed=1)
    kinds = {get_args(config.model_fields["kind"].annotation)[0] for config in get_args(get_args(ConnectorConfig)[0])}
    assert set(rows) == kinds | {"concat"}
    for name, recipe in rows.items():
        assert [stage.budget.samples for stage in recipe.stages] == [64, 32]
        assert recipe.source.vpg.connector.standardised
        assert recipe.source.vpg.encoder.kind == ("concat" if name == "concat" else "efficientnet-lite0")

    ran = []

    def measure(recipe):
        ran.append((recipe.name, recipe.seed))
        cost = {"tokens": 9, "parameters": 1_500_000, "flops": 60_000_000}
        return {"recipe": bench.recipe_hash(recipe), "val_loss": 4.0 + recipe.seed, **cost}

    monkeypatch.setattr(bench, "measure", measure)

    def call(*arguments: str) -> list[tuple[str, int]]:
        ran.clear()
        monkeypatch.setattr(sys, "argv", ["connectors.py", "--output", str(tmp_path / "out.json"), *arguments])
        bench.main()
        return list(ran)

    assert call("--only", "pool", "merge") == [("pool", 0), ("merge", 0)]
    assert call("--only", "pool", "--seeds", "2") == [("pool", 1)]  # what is there is not run again
    assert call("--table") == []
    shown = capsys.readouterr().out.strip().splitlines()[-2:]
    assert shown == [
        "| `merge` | 9 | 1.50 M | 60 | 4.00 |",
        "| `pool` | 9 | 1.50 M | 60 | 4.50 [4.00 - 5.00] |",
    ]
    assert call("--only", "pool", "--words", "8") == [("pool", 0)]


def test_flops_are_two_for_each_multiplication_and_attention_counts():
    import torch

    from vpgtrans.config import CrossAttentionConnectorConfig, PoolConnectorConfig
    from vpgtrans.vision import connectors

    flops = script("connectors").flops
    pool = connectors.build(PoolConnectorConfig(tokens=4, width=8, hidden=6), width_in=10, patches=36)
    assert flops(pool, torch.zeros(1, 36, 10)) == 2 * 4 * (10 * 6 + 6 * 8)
    config = CrossAttentionConnectorConfig(queries=3, width=8, heads=2)
    cross = connectors.build(config, width_in=10, patches=36)
    projections = 36 * 10 * 8 + 3 * 8 * 8 + 2 * 36 * 8 * 8 + 3 * 8 * 8
    assert flops(cross, torch.zeros(1, 36, 10)) == 2 * (projections + 2 * 3 * 36 * 8)


def test_the_connector_benchmark_trains_a_row(tiny, monkeypatch):
    from tiny_runs import source_keys

    from vpgtrans.recipe import parse_recipe

    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    found = script("connectors").measure(parse_recipe(keys))
    assert (found["tokens"], found["width"], found["samples"]) == (4, 16, [8])
    assert found["val_loss"] > 0
    assert found["flops"] > 0


def test_the_docs_show_what_the_isolation_benchmark_found(tmp_path, monkeypatch, capsys):
    isolation = script("isolation")
    found = json.loads(isolation.RESULTS.read_text())["models"]
    assert set(found) == {*isolation.FAMILIES, *isolation.REAL}
    assert isolation.summary(found) in (BENCHMARKS.parent / "docs" / "packing.md").read_text()
    output = tmp_path / "isolation.json"
    monkeypatch.setattr(sys, "argv", ["isolation.py", "--models", "llama", "opt", "--output", str(output)])
    isolation.main()
    again = json.loads(output.read_text())["models"]
    for model in again.values():
        for way, figures in model.items():
            if "refused" in figures:
                continue
            apart = way in isolation.BACKENDS
            assert (figures["neighbour"] == 0) == apart
            assert (max(figures["logits"], figures["gradients"]) < 1e-4) == apart
    assert [way for way, figures in again["opt"].items() if "refused" in figures] == ["sdpa", "eager"]
    assert "| opt | sdpa | refused |" in capsys.readouterr().out


def test_the_picture_of_a_mask_shows_the_pairs_of_a_pack(tmp_path):
    packing_mask = script("packing_mask")
    llm = open_llm(str(tiny_llm("llama", tmp_path / "llm")), dtype=torch.float32)
    for both_ways in (False, True):
        segments, names = packing_mask.joined(llm, both_ways=both_ways)
        seen, size = packing_mask.allowed(segments), segments.shape[1]
        sample = np.repeat(np.arange(3), segments.lengths)
        together = np.array([[a == b and a.startswith("image") for b in names] for a in names])
        causal = np.tri(size, dtype=bool) & (sample[:, None] == sample)
        assert np.array_equal(seen, causal | together if both_ways else causal)
        packing_mask.draw(segments, names, title="a pack").savefig(tmp_path / "mask.png")
        assert Image.open(tmp_path / "mask.png").size == (900, 960)


def test_low_to_high_differs_in_its_first_stage_alone_and_counts_what_is_seen_sharply():
    bench = script("low_to_high")
    size = {"samples": 64, "low": 32, "every": 16, "images": 8, "seed": 0}
    high, both = (bench.arm(name, **size) for name in bench.ARMS)
    assert both.stages[1:] == high.stages
    assert [recipe.resolution_of(recipe.stages[0]).visual_tokens for recipe in (both, high)] == [16, 144]
    assert both.source == high.source
    lines = {
        "high": [
            {"stage": "high", "samples": 0, "seconds": 1.0, "val_loss": 9.0},
            {"stage": "high", "samples": 64, "seconds": 41.0, "val_loss": 5.0},
        ],
        "low to high": [
            {"stage": "low", "samples": 32, "seconds": 5.0, "val_loss": 4.0},
            {"stage": "high", "samples": 32, "seconds": 6.0, "val_loss": 6.0},
            {"stage": "high", "samples": 48, "seconds": 20.5, "val_loss": 4.9},
        ],
    }
    found = bench.compare(lines)
    assert (found["goal"], found["times_sooner"]) == (5.0, 2.0)
    assert found["arms"]["low to high"]["samples"] == 48
    assert "| 0 | low to high | 5.000 | 20.5 | 48 | 4.900 |" in bench.table([found])
    never = bench.compare(lines | {"low to high": lines["low to high"][:2]})
    assert never["times_sooner"] is None
    assert "| 0 | low to high | 5.000 | – | – | 6.000 |" in bench.table([never])


@pytest.mark.parametrize("packing", [None, {"max_tokens": 64}])
def test_the_bare_loop_learns_what_our_stages_learn(tiny, packing, tmp_path):
    step = script("step")
    recipe = tiny.transfer_recipe(data=tiny.data() | {"packing": packing}, initialiser="inherit")
    recipe = step.shortened(recipe, packed=packing is not None, updates={"warmup": 1, "finetune": 2})
    for index, updates in enumerate((1, 2)):
        cell = step.alternate(step.opened(recipe), recipe, index, features=tmp_path)
        assert cell.apart < 1e-5
        found = step.summarise(cell)
        assert found["updates"] >= updates
        assert found["largest_loss_difference"] < 1e-5
        assert found["last_loss"] != found["first_loss"]
        assert found["ratio"] > 0
        assert "| 0e+00 | 4e-08 |" in step.line(
            "warmup", "packed", found | {"largest_loss_difference": 0.0, "largest_weight_difference": 4e-8}
        )


def test_both_sides_of_the_trainer_benchmark_train_one_model_on_the_same_batches(tmp_path, tiny, monkeypatch):
    trainer = script("trainer")
    monkeypatch.setattr(trainer, "BATCH", 2)
    with write_captions(tmp_path / "rows.parquet", count=8).open("rb") as stream:
        rows = pq.read_table(stream).to_pylist()
    lines = []
    for number, row in enumerate(rows):
        (tmp_path / f"{row['id']}.png").write_bytes(row["image"])
        caption = row["caption"] * (1 + number % 3)
        lines.append(json.dumps({"id": row["id"], "image": f"{row['id']}.png", "caption": caption}) + "\n")
    (tmp_path / "8.jsonl").write_text("".join(lines))
    trainer.make(tmp_path, llm=str(tiny.source_llm), vision=VISION, samples=8)
    given = trainer.recipe_of

    def exact(*arguments, **options):
        recipe = given(*arguments, **options)
        return recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"precision": "fp32"})})

    monkeypatch.setattr(trainer, "recipe_of", exact)
    stock = trainer.side_of("trainer, float32")(tmp_path, 8)
    ours = {name: trainer.side_of(f"ours, {name}")(tmp_path, 8) for name in ("padded, cached", "packed")}
    assert stock["losses"][0] == pytest.approx(ours["padded, cached"]["losses"][0], rel=2e-3)  # cached in bf16
    assert stock["losses"] == pytest.approx(ours["padded, cached"]["losses"], rel=0.01)
    assert len(stock["losses"]) == len(ours["padded, cached"]["losses"]) == 4
    assert ours["padded, cached"]["first_pass_seconds"] > 0
    assert (stock["samples"], ours["padded, cached"]["samples"]) == (4, 4)

    played = {f"trainer, {name}": stock | {"seconds": 2.0, "peak_bytes": 200} for name in trainer.TRAINER}
    played["trainer, bf16 weights"] = stock | {"seconds": 1.0, "peak_bytes": 100}
    cached = ours["padded, cached"] | {"seconds": 0.5, "peak_bytes": 50, "all_samples": 8, "first_pass_seconds": 1.0}
    rounds = [played | {"ours, padded, cached": cached}]
    sides = [*played, *(f"ours, {name}" for name in trainer.OURS)]
    assert trainer.to_play(rounds, sides) == "ours, packed, cached"
    rounds[0] |= dict.fromkeys(sides[5:], cached)
    assert trainer.to_play(rounds, sides) == "trainer, bf16 weights, grouped by length"
    rounds[0]["trainer, bf16 weights, grouped by length"] = stock | {"seconds": 1.0, "peak_bytes": 100}
    assert trainer.to_play(rounds, sides) is None
    assert trainer.to_play([*rounds, {}], sides) == "trainer, bf16 weights"
    found = trainer.summarise(rounds)
    side = found["ours, padded, cached"]
    assert (side["ratio"], side["memory"]) == (2.0, 0.5)
    # 1/8 second a sample, and as much again for the first pass of one epoch
    assert side["ratio_with_first_pass_over_1"] == pytest.approx(1.0)
    assert side["ratio_with_first_pass_over_3"] == pytest.approx(1.5)
    assert "| ours, padded, cached | 8.00 | 2.00 | 1.00 / 1.50 |" in trainer.table(found)


def test_the_fitting_benchmark_trains_every_side_on_the_same(tmp_path, monkeypatch):
    fitting = script("fitting")
    monkeypatch.setattr(fitting, "MODELS", {"tiny": str(tiny_llm("llama", tmp_path / "llm", width=64))})
    for name, value in {"SAMPLES": 2, "WORDS": 9, "VISUAL_TOKENS": 3, "TARGETS": 7, "VOCABULARY": 50}.items():
        monkeypatch.setattr(fitting, name, value)
    rows = {side: fitting.measure("tiny", side, 1) for side in fitting.SIDES}
    assert len({row["targets"] for row in rows.values()}) == 1
    for side, row in rows.items():
        # quantised weights, and moments in 8 bits after the first step, differ a little
        assert row["losses"] == pytest.approx(rows["lora"]["losses"], rel=0.02), side
        assert row["peak_mb"] > 0
    for plain in ("lora", "nf4", "int8"):
        assert rows[f"{plain}, checkpointed"]["losses"] == rows[plain]["losses"]
    heads = [fitting.measure_head(side, 0) for side in fitting.HEADS]
    assert heads[0]["loss"] == heads[1]["loss"]
    assert heads[0]["gradient_norm"] == pytest.approx(heads[1]["gradient_norm"], rel=1e-2)


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="compares with curl, which is not installed")


@pytest.mark.parametrize(
    "arguments",
    [
        ("hostile.py", "--cases", "11"),
        pytest.param(("pull.py", "--bytes", "1000000", "--repeats", "1"), marks=needs_curl),
    ],
    ids=["hostile", "pull"],
)
def test_benchmarks_of_the_registry_run(arguments):
    """In a process of their own, since one watches what its process does and both set the cache."""
    script, *options = arguments
    command = [sys.executable, str(BENCHMARKS / script), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=BENCHMARKS.parent)
    assert result.returncode == 0, result.stderr[-2000:]
    measured = json.loads(result.stdout)
    if script == "hostile.py":  # 0 escapes, executions, hangs and the like, or it ends otherwise
        assert measured["cases"] == 11
    else:
        assert measured["curl_by_pull"]["median"] > 0
