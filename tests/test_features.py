"""Images on their way into training: unreadable ones, the frozen front and its cache."""

import json

import pytest
import torch
from tiny_training import (
    FINETUNE,
    WARMUP,
    Pictures,
    all_tensors,
    build_vlm,
    lines,
    make_recipe,
    mixtures,
    train,
)

from vpgtrans.config import AugmentConfig
from vpgtrans.errors import TrainingError
from vpgtrans.training.features import FeatureCache, FrozenFront
from vpgtrans.training.fit import boundary
from vpgtrans.training.module import StageModule
from vpgtrans.training.samples import BadSamples, Unreadable

# --- unreadable images --------------------------------------------------------------------------


def lenient(stage, fraction: float):
    entry = [{"dataset": "unused"}]
    return make_recipe([stage], data={"train": entry, "validation": entry, "max_bad_fraction": fraction})


@pytest.mark.parametrize("cached", [True, False])
def test_unreadable_images_are_skipped_and_listed(root, tmp_path, cached):
    stage = {**WARMUP, "budget": {"samples": 28}, "cache_features": cached}
    (result,) = train(build_vlm(root), lenient(stage, 0.3), tmp_path, unreadable=[2, 5])
    assert (result.updates, result.samples) == (7, 28)
    listed = lines(tmp_path / "quarantine.jsonl")
    assert sorted(line["id"] for line in listed) == ["s0-02", "s0-05"]
    counts = json.loads((tmp_path / "data.json").read_text())
    assert counts == {"seen": 19, "used": 17, "quarantined": 2, "dropped": 0, "rules": {}}
    assert all("not a readable image" in line["reason"] for line in listed)
    pictures = Pictures(14)
    vlm = build_vlm(root)
    taught = [int(row) for row in mixtures()["train"].draws(0, 0, 28) if row not in (2, 5)]
    assert result.text_tokens == sum(vlm.splice.prompter.encode(pictures.captions[row]).answers for row in taught)


@pytest.mark.parametrize("cached", [True, False])
def test_too_many_unreadable_images_stop_the_run(root, tmp_path, cached):
    stage = {**WARMUP, "budget": {"samples": 28}, "cache_features": cached}
    with pytest.raises(TrainingError, match=r"of 1?\d samples are unreadable, more than data\.max_bad_fraction = 0\.1"):
        train(build_vlm(root), lenient(stage, 0.1), tmp_path, unreadable=[2, 5])
    assert len(lines(tmp_path / "quarantine.jsonl")) == 2
    # What is cached is known before the first update; else the run stops at the second unreadable image.
    assert (tmp_path / "metrics.jsonl").exists() != cached


@pytest.mark.parametrize("cached", [True, False])
def test_a_few_unreadable_images_at_the_start_do_not_stop_the_run(root, tmp_path, cached):
    """Two of the first four images, and two of the 19 that the stage visits."""
    first = mixtures()["train"].draws(0, 0, 4)
    unreadable = [int(row) for row in first[:2]]
    stage = {**WARMUP, "budget": {"samples": 28}, "cache_features": cached}
    train(build_vlm(root), lenient(stage, 0.11), tmp_path, unreadable=unreadable)
    assert {line["id"] for line in lines(tmp_path / "quarantine.jsonl")} == {f"s0-{row:02d}" for row in unreadable}


def test_a_run_that_was_allowed_to_go_on_is_allowed_to_resume(root, tmp_path, monkeypatch):
    """The images of its last update are not counted as if they were all."""
    unreadable = [int(row) for row in mixtures()["train"].draws(0, 8, 10)]
    recipe = lenient({**WARMUP, "budget": {"samples": 12}, "validate_every": 4, "cache_features": True}, 0.15)
    with pytest.MonkeyPatch.context() as patch:
        step = StageModule.training_step

        def stop_at_the_last(self, batch, batch_idx):
            if self.done == 2:
                raise KeyError("here")
            step(self, batch, batch_idx)

        patch.setattr(StageModule, "training_step", stop_at_the_last)
        with pytest.raises(KeyError, match="here"):
            train(build_vlm(root), recipe, tmp_path, unreadable=unreadable)
    (result,) = train(build_vlm(root), recipe, tmp_path, resume=True, unreadable=unreadable)
    assert result.updates == 3


def test_how_many_unreadable_images_are_too_many():
    def bad_among(seen: int, bad: int, *, expected: int) -> BadSamples:
        counted = BadSamples(0.01, expected=expected)
        counted.note([Unreadable(("train", row), f"s{row}", "damaged") for row in range(bad)], seen=seen)
        return counted

    bad_among(4, 2, expected=200)
    bad_among(20, 10, expected=1000)
    bad_among(5000, 50, expected=1000)
    bad_among(5, 1, expected=5)  # one alone never stops a run
    for seen, bad, expected, saying in (
        (4, 3, 200, "3 of 4 samples are unreadable, .* = 0.01 allows of 200: s0: damaged; s1: damaged"),
        (20, 11, 1000, "allows of 1000"),
        (5000, 51, 1000, "51 of 5000 samples are unreadable, .* = 0.01 allows: s0"),
        (5, 2, 5, "2 of 5 samples"),
    ):
        with pytest.raises(TrainingError, match=saying):
            bad_among(seen, bad, expected=expected)


def test_rows_of_the_same_id_are_counted_each():
    counted = BadSamples(1.0)
    rows = [Unreadable(("train", line), "same", "no image", dropped=line > 2) for line in (1, 2, 2, 3, 4)]
    counted.note(rows, seen=9)
    counted.note(rows)  # seen again in the next epoch
    assert (len(counted.bad), len(counted.dropped), counted.left_out) == (2, 2, 4)


def test_a_resumed_run_keeps_its_list_of_skipped_images(root, tmp_path):
    (tmp_path / "quarantine.jsonl").write_text('{"id": "older", "reason": "gone"}\n')
    train(build_vlm(root), lenient(WARMUP, 0.3), tmp_path, resume=True)
    assert lines(tmp_path / "quarantine.jsonl") == [{"id": "older", "reason": "gone"}]


# --- the frozen front and its cache -------------------------------------------------------------


@pytest.mark.parametrize("level", ["tokens", "patches", "pixels"])
def test_the_front_and_the_rest_make_the_vpg(root, level):
    vlm, pictures = build_vlm(root).eval(), Pictures(3)
    images = [pictures.image(row) for row in range(3)]
    front = FrozenFront(vlm.vpg, level, dtype=torch.float32)
    with torch.no_grad():
        expected = vlm.visual_tokens(images)
        torch.testing.assert_close(front.rest(front(images)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", ["tokens", "patches"])
def test_cached_features_equal_computed_ones(root, tmp_path, level):
    vlm, pictures = build_vlm(root).train(), Pictures(9)  # the front itself must switch dropout off
    front = FrozenFront(vlm.vpg, level)
    cache = FeatureCache(pictures, front, directory=tmp_path)
    cache.ensure([0, 4, 2], batch_size=3)
    computed = front([pictures.image(row) for row in (0, 2, 4)])
    assert computed.dtype == torch.bfloat16
    assert torch.equal(cache[[0, 2, 4]], computed)
    again = FeatureCache(pictures, front, directory=tmp_path)
    again.ensure([0, 2, 4, 8])
    assert torch.equal(again[[4, 0]], computed[[2, 0]])
    torch.testing.assert_close(again[[8]], front([pictures.image(8)]), rtol=2**-7, atol=1e-6)


def test_what_is_there_is_not_computed_again(root, tmp_path, monkeypatch):
    vlm, pictures = build_vlm(root), Pictures(9, unreadable=[3])
    FeatureCache(pictures, FrozenFront(vlm.vpg, "tokens"), directory=tmp_path).ensure(range(5))
    cache = FeatureCache(pictures, FrozenFront(vlm.vpg, "tokens"), directory=tmp_path)
    opened: list[int] = []
    image = Pictures.image
    monkeypatch.setattr(Pictures, "image", lambda self, index: opened.append(index) or image(self, index))
    cache.ensure(range(7))
    assert opened == [3, 5, 6]  # what could not be read may be there by now
    reason = "pictures, row 3: 8 bytes of image data: not a readable image (of no format that Pillow knows)"
    assert cache.unreadable(range(7)) == {3: reason}
    monkeypatch.setattr(Pictures, "image", lambda self, index: image(self, 0))
    later = FeatureCache(pictures, FrozenFront(vlm.vpg, "tokens"), directory=tmp_path)
    later.ensure(range(7))
    assert later.unreadable(range(7)) == {}
    assert torch.equal(later[[3]], later[[0]])


def test_a_killed_computation_leaves_no_row_that_looks_whole(root, tmp_path):
    vlm, pictures = build_vlm(root), Pictures(9)
    front = FrozenFront(vlm.vpg, "tokens")
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    cache = FeatureCache(pictures, front, directory=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.ensure(range(9), batch_size=2, each=stop)
    whole = FeatureCache(pictures, front, directory=tmp_path / "whole")
    whole.ensure(range(9), batch_size=2)
    resumed = FeatureCache(pictures, front, directory=tmp_path)
    resumed.ensure(range(9), batch_size=2)
    assert torch.equal(resumed[range(9)], whole[range(9)])
    assert resumed[range(9)].float().abs().sum(dim=(1, 2)).min() > 0


def test_the_caches_key_covers_what_the_numbers_depend_on(root):
    vlm, pictures = build_vlm(root), Pictures(4)

    def key(level="patches", dtype=torch.bfloat16, images=pictures) -> str:
        return FeatureCache(images, FrozenFront(vlm.vpg, level, dtype=dtype)).directory.name

    keys = {
        "first": key(),
        "level": key("tokens"),
        "dtype": key(dtype=torch.float32),
        "images": key(images=Pictures(4, seed=1)),
    }
    with torch.no_grad():
        vlm.vpg.connector.queries.add_(1)
    assert key() == keys["first"]  # patches do not depend on the connector
    keys["connector"] = key("tokens")
    with torch.no_grad():
        next(vlm.vpg.encoder.parameters()).view(-1)[0] += 1
    keys["encoder"] = key()
    image = vlm.vpg.config.encoder.image.model_copy(update={"fit": "crop"})
    vlm.vpg.encoder.config = vlm.vpg.config.encoder.model_copy(update={"image": image})
    keys["preprocessing"] = key()
    vlm.vpg.connector.limit(1)
    keys["limit"] = key("tokens")
    assert len(set(keys.values())) == len(keys)


def test_boundaries():
    def of(trainable, *, augmentation=None, **changes):
        stage = {"name": "only", "trainable": trainable, "budget": {"samples": 4}}
        return boundary(make_recipe([stage | changes]).stages[0], augmentation)

    assert of({"projector": "full"}) == ("tokens", True)
    assert of({"llm": "lora"}) == ("tokens", True)
    assert of({"connector": "full"}) == ("patches", True)
    assert of({"connector": "full"}, cache_features=False) == ("patches", False)
    assert of({"encoder": "full"}) == ("pixels", False)
    assert of({"connector": "full"}, augmentation=AugmentConfig()) == ("pixels", False)
    assert of({"connector": "full"}, augmentation=AugmentConfig(views=2)) == ("patches", True)
    assert of({"encoder": "full"}, augmentation=AugmentConfig(views=2)) == ("pixels", False)


def test_a_cached_run_equals_an_uncached_one(root, tmp_path):
    ends = []
    for cached in (True, False):
        vlm = build_vlm(root)
        stages = [{**WARMUP, "cache_features": cached}, {**FINETUNE, "lora": {}, "cache_features": cached}]
        train(vlm, make_recipe(stages), tmp_path / str(cached))
        ends.append(all_tensors(vlm))
    # Features are computed in batches of another size: a rare one is rounded the other way.
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=2e-3, rtol=1e-2)
