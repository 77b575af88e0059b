"""Whole runs whose images are cut into tiles, keep their size, or get sharper from stage to stage."""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filters import filtered
from PIL import Image
from test_resume import Crash, crash_at
from tiny_runs import Tiny, source_keys
from tiny_training import FINETUNE, WARMUP, all_tensors, build_vlm, make_models, make_recipe, train

from vpgtrans import runs
from vpgtrans.config import ResolutionConfig
from vpgtrans.data.mixture import open_mixture
from vpgtrans.errors import RecipeError
from vpgtrans.recipe import Recipe, dump, parse_recipe, recipe_hash
from vpgtrans.runs.answers import answer
from vpgtrans.runs.data import data_stats, open_prompters
from vpgtrans.runs.packs import data_pack
from vpgtrans.runs.use import validate
from vpgtrans.training.fit import StageRun
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm_directory import load_vlm

SHAPES = ((28, 28), (90, 40), (40, 100), (60, 60), (150, 14))
TILES = {"fit": "tiles", "max_tiles": 4}
NATIVE = {"fit": "native", "max_patches": 12}
POOL = {"kind": "pool", "tokens": 4, "width": 16}


@pytest.fixture(scope="module")
def data(tiny: Tiny) -> dict[str, Any]:
    """Images of several shapes."""
    random = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {"id": [], "image": [], "caption": []}
    for row in range(15):
        width, height = SHAPES[row % 5]
        stream = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
        rows["id"].append(str(row))
        rows["image"].append(stream.getvalue())
        rows["caption"].append(("a red cat", "a blue clock on the wall")[row % 2])
    paths = {}
    for role, stop in (("train", 10), ("validation", 15)):
        paths[role] = tiny.root / f"shapes-{role}.parquet"
        start = stop - (10 if role == "train" else 5)
        pq.write_table(pa.table({key: values[start:stop] for key, values in rows.items()}), paths[role])
    return {role: [{"dataset": str(path)}] for role, path in paths.items()}


def stages(**both: Any) -> list[dict[str, Any]]:
    """Two updates each."""
    return [
        {"name": "warmup", "trainable": {"projector": "full"}, "lr": 1e-3, "budget": {"samples": 8}, "batch_size": 4},
        {"name": "finetune", "trainable": {"connector": "full", "projector": "full"}, "lr": 1e-3,
         "budget": {"samples": 8}, "batch_size": 4, "micro_batch_size": 2},
    ]  # fmt: skip


@pytest.mark.parametrize("resolution", [TILES, NATIVE])
def test_a_run_trains_saves_and_opens_again(tiny: Tiny, data, tmp_path, resolution, monkeypatch):
    recipe = tiny.transfer_recipe(data=data, stages=stages(), resolution=resolution)
    kept: list[Any] = []
    save = runs.journey.save_vlm
    monkeypatch.setattr(
        runs.journey, "save_vlm", lambda vlm, *rest, **more: kept.append(vlm) or save(vlm, *rest, **more)
    )
    path = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    assert json.loads((path / "data.json").read_text()) | {"rules": {}} == {
        "seen": 15, "used": 15, "quarantined": 0, "dropped": 0, "rules": {},
    }  # fmt: skip
    vlm, mixture = load_vlm(str(path), dtype=torch.float32), open_mixture(recipe.data.validation)
    trained, opened = (
        answer(each, mixture, range(5), max_new_tokens=3, with_loss=True) for each in (kept[0].eval(), vlm)
    )
    assert opened.nll == pytest.approx(trained.nll, rel=1e-6)
    assert (opened.predictions, opened.rows) == (trained.predictions, [0, 1, 2, 3, 4])
    assert vlm.vpg.encoder.config.image.fit == resolution["fit"]
    assert len(vlm.generate([Image.new("RGB", (90, 40)), Image.new("RGB", (20, 30))], max_new_tokens=2)) == 2
    # To compare images a filter sees all of them alike.
    scores = tmp_path / "scores.parquet"
    filtered(data["train"][0]["dataset"], "--scores", scores, "--scorer", "vlm-loss", "--scorer", "vlm-gap",
             "--vlm", path, "--others", "3", "--keep-fraction", "0.5")  # fmt: skip
    train, squares = open_mixture(recipe.data.train), load_vlm(str(path))
    squares.see_squares()
    sums, tokens = squares.splice.caption_nll(
        squares.prompts([train.image(row) for row in range(10)]), [train.caption(row) for row in range(10)]
    )
    np.testing.assert_allclose(pq.read_table(scores)["vlm-loss"], sums / tokens, atol=2e-2)
    # A source that sees so is seen so: nothing needs to be said again.
    again = tiny.transfer_recipe(source={"vpg": str(path)}, data=data, initialiser="inherit")
    assert open_prompters(again)[0].layouts.key == vlm.vpg.layouts.key


def test_tiles_that_are_cached_train_to_the_same(tiny: Tiny, data, tmp_path):
    losses = []
    for cached in (True, False):
        some = [stage | {"cache_features": cached} for stage in stages()]
        recipe = tiny.transfer_recipe(data=data, stages=some, resolution=TILES)
        path = runs.transfer(recipe, output=tmp_path / str(cached), device="cpu")
        losses.append(json.loads((path / "summary.json").read_text())["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # a cache is in half precision


@pytest.mark.parametrize("resolution", [TILES, NATIVE])
def test_packed_rows_hold_whole_images_and_learn_the_same(tiny: Tiny, data, tmp_path, resolution):
    some = [{key: value for key, value in stage.items() if key != "micro_batch_size"} for stage in stages()]
    some[0]["visual_tokens"] = 2
    logs = []
    for packing in ({"max_tokens": 120}, None):
        recipe = tiny.transfer_recipe(data=data | {"packing": packing}, stages=some, resolution=resolution)
        path = runs.transfer(recipe, output=tmp_path / str(bool(packing)), device="cpu")
        logs.append([json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()])
    # Other samples train in other updates, so what can be compared is the first validation.
    first = [next(line["val_loss"] for line in log if "val_loss" in line) for log in logs]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert all(any(line["stage"] == "finetune" for line in log) for log in logs)


def test_statistics_plan_and_run_count_the_same_tokens(tiny: Tiny, data):
    for resolution in (TILES, NATIVE, {}):
        recipe = tiny.transfer_recipe(data=data, resolution=resolution)
        counted = data_stats(recipe, show=10)["train"]["mixture"]["tokens"]
        planned = data_pack(recipe, max_tokens=400)
        mixture = open_mixture(recipe.data.train)
        lengths = [len(mixture.encode(row, open_prompters(recipe)[-1])) for row in range(10)]
        assert planned["tokens"] == sum(lengths) == round(10 * counted["length"]["mean"])
        assert planned["images_per_pack"] * planned["packs"] == 10
        assert data_pack(recipe, max_tokens=400)["plan"] == planned["plan"]
    assert data_pack(tiny.transfer_recipe(data=data, resolution=TILES), max_tokens=400)["plan"] != planned["plan"]


def test_an_image_whose_tiles_pass_the_limit_is_left_out_and_counted(tiny: Tiny, data, tmp_path):
    recipe = tiny.transfer_recipe(data=data, stages=stages(), resolution=TILES, prompt={"max_tokens": 24})
    path = runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    counts = json.loads((path / "data.json").read_text())
    assert counts["rules"] == {"too long": counts["dropped"]}
    assert counts["dropped"] + counts["used"] == counts["seen"] == 15
    assert counts["dropped"] == 12  # all but the images of one tile
    assert data_stats(recipe)["train"]["mixture"]["rules"] == {"too long": 8}


# --- low to high --------------------------------------------------------------------------------


def low_to_high(tiny: Tiny, connector: dict[str, Any], low: dict[str, Any], high: dict[str, Any]) -> Recipe:
    keys = source_keys(tiny.encoder, tiny.source_llm, tiny.data())
    encoder = {"kind": "huggingface", "reference": str(tiny.encoder), "select": "patch"}
    warmup, finetune = stages()
    warmup["trainable"] = (
        {"connector": "full", "projector": "full"} if connector["kind"] == "pool" else {"projector": "full"}
    )
    return parse_recipe(
        keys
        | {"source": {"vpg": {"encoder": encoder, "connector": connector}}, "stages": [warmup | low, finetune | high]}
    )


@pytest.mark.parametrize(
    ("connector", "low", "high", "tokens"),
    [
        (POOL, {"visual_tokens": 1}, {"visual_tokens": 4}, (1, 4)),
        ({"kind": "identity"}, {"image_size": 14}, {"image_size": 56, "visual_tokens": 9}, (1, 9)),
        ({"kind": "qformer", "queries": 4, "width": 16, "layers": 1, "heads": 2, "hidden": 32, "positions": True},
         {"visual_tokens": 2, "image_size": 14}, {"image_size": 42}, (2, 4)),
    ],
)  # fmt: skip
def test_stages_get_sharper_and_the_result_is_as_sharp_as_the_last(
    tiny: Tiny, tmp_path, connector, low, high, tokens, monkeypatch
):
    recipe = low_to_high(tiny, connector, low, high)
    seen: list[tuple[str, int, int]] = []
    run = StageRun.run

    def watched(self, *rest):
        seen.append((self.stage.name, self.vlm.vpg.tokens, self.vlm.splice.prompter.visual_tokens))
        assert len(self.data.samples.fetch([0]).encoded[0].layouts) == 1
        return run(self, *rest)

    monkeypatch.setattr(StageRun, "run", watched)
    path = runs.train(recipe, output=tmp_path / "run", device="cpu")
    assert seen == [("warmup", tokens[0], tokens[0]), ("finetune", tokens[1], tokens[1])]
    manifest = json.loads((path / "vlm" / "manifest.json").read_text())
    assert manifest["visual_tokens"] == manifest["lineage"]["visual_tokens"] == tokens[1]
    vlm = load_vlm(str(path), dtype=torch.float32)
    assert vlm.vpg.tokens == tokens[1]
    val_loss = json.loads((path / "summary.json").read_text())["val_loss"]
    found = answer(vlm, open_mixture(recipe.data.validation), range(8), max_new_tokens=1, with_loss=True)
    assert sum(found.nll) / sum(found.tokens) == pytest.approx(val_loss, rel=2e-3)
    assert [p.visual_tokens for p in open_prompters(recipe)] == list(tokens)
    paddings = data_stats(recipe)["padding"]
    assert [row["stage"] for row in paddings] == ["warmup", "finetune"]


@pytest.mark.parametrize(("stage", "update"), [("warmup", 1), ("finetune", 0), ("finetune", 3)])
def test_a_run_that_stops_in_a_stage_goes_on_at_its_resolution(tmp_path, stage, update):
    root = make_models(tmp_path / "models")
    recipe = make_recipe([WARMUP | {"visual_tokens": 1}, FINETUNE | {"image_size": 56, "visual_tokens": 2}])
    expected = build_vlm(root)
    train(expected, recipe, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, stage, update)
        with pytest.raises(Crash):
            train(build_vlm(root), recipe, tmp_path / "cut")
    vlm = build_vlm(root)
    train(vlm, recipe, tmp_path / "cut", resume=True)
    ours, tensors = all_tensors(vlm), all_tensors(expected)
    assert [name for name in tensors if not torch.equal(ours[name], tensors[name])] == []
    assert (vlm.vpg.tokens, vlm.vpg.encoder.config.image.size) == (2, 56)
    finished = build_vlm(root)
    train(finished, recipe, tmp_path / "cut", resume=True)
    assert (finished.vpg.tokens, finished.vpg.encoder.config.image.size) == (2, 56)


# --- recipes ------------------------------------------------------------------------------------


def test_a_recipe_that_says_nothing_of_resolution_has_the_hash_it_had(tiny: Tiny):
    plain = tiny.transfer_recipe()
    assert "resolution" not in plain.model_dump(exclude_defaults=True)
    spelled = parse_recipe(tiny.transfer_keys(resolution={"fit": None}))
    assert recipe_hash(plain) == recipe_hash(spelled)
    assert recipe_hash(plain) != recipe_hash(tiny.transfer_recipe(resolution={"fit": "tiles"}))
    assert "resolution:" in dump(plain)
    merged = parse_recipe(tiny.transfer_keys(resolution={"visual_tokens": 3, "fit": "tiles"}))
    stage = merged.stages[0].model_copy(update={"visual_tokens": 2})
    assert merged.resolution_of(stage) == ResolutionConfig(fit="tiles", visual_tokens=2)


@pytest.mark.parametrize(
    ("changes", "stage", "saying"),
    [
        ({"fit": "tiles", "max_tiles": 0}, {}, "resolution.max_tiles: is 0"),
        ({"fit": "tiles", "max_tiles": 1001}, {}, "resolution.max_tiles: is 1001; right would be a whole number above "
         "0 and at most 1000"),
        ({"fit": "pad", "thumbnail": True}, {}, "resolution: thumbnail: goes with fit: tiles only, not with pad"),
        ({"fit": "tile"}, {}, "did you mean tiles?"),
        ({"max_tile": 2}, {}, "unknown key max_tile (did you mean max_tiles?)"),
        ({}, {"visual_tokens": 0}, "visual_tokens: is 0"),
    ],
)  # fmt: skip
def test_a_wrong_resolution_is_found_in_the_recipe(tiny: Tiny, changes, stage, saying):
    keys = tiny.transfer_keys(resolution=changes)
    keys["stages"][0] |= stage
    with pytest.raises(RecipeError) as refusal:
        parse_recipe(keys)
    assert saying in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_two_way_attention_in_native_images_is_found_before_anything_is_loaded(tiny: Tiny):
    recipe = tiny.transfer_recipe(resolution=NATIVE, prompt={"image_attention": "bidirectional"})
    for look in (validate, data_stats):
        with pytest.raises(RecipeError, match="bidirectional does not go with fit: native"):
            look(recipe)


@pytest.mark.parametrize(
    ("changes", "stage", "saying"),
    [
        ({"max_tiles": 3}, {}, "stage finetune: max_tiles: goes with fit: tiles only, not with squash; leave it out"),
        ({}, {"visual_tokens": 5},
         "stage warmup: connector: qformer can't give 5 visual tokens; right would be at most the number of "
         "queries, 4"),
        ({}, {"image_size": 20},
         "stage warmup: image_size: 20 is no multiple of the encoder's patch, 14 pixels; right would be 14 or 28"),
        ({"fit": "tiles"}, {"losses": {"words": 1.0}},
         "stage warmup: losses.words puts a caption's words on the prompts of one square; it does not go with fit: "
         "tiles"),
        ({"fit": "native"}, {"cache_features": True},
         "stage warmup: cache_features: true needs images of one shape; it does not go with fit: native"),
    ],
)  # fmt: skip
def test_what_the_source_cannot_is_found_at_once(tiny: Tiny, tmp_path, changes, stage, saying, monkeypatch):
    keys = tiny.transfer_keys(resolution=changes)
    keys["stages"][0] |= stage
    recipe = parse_recipe(keys)
    with pytest.raises(RecipeError) as refusal:
        runs.transfer(recipe, output=tmp_path / "run", device="cpu")
    assert str(refusal.value) == saying
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(VPG, "encode", lambda *_: pytest.fail("an image was encoded"))
    with pytest.raises(RecipeError, match=saying[:30]):
        validate(recipe)
