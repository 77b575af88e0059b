"""Augmented views: deterministic, bounded, apart from the validation set, and cached where their number is fixed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_training import FINETUNE, Pictures, build_vlm, lines, make_recipe, mixtures, train

from vpgtrans.config import AugmentConfig
from vpgtrans.training.draws import SampleDraws
from vpgtrans.training.features import FrozenFront
from vpgtrans.training.loading import Updates
from vpgtrans.training.samples import BadSamples, Samples, View
from vpgtrans.vision.augment import random_view

STILL = AugmentConfig(rotation=0, scale=[1, 1], shift=0, colour=0)


def drawing(width: int = 40, height: int = 30) -> Image.Image:
    """A blue block on transparency, off the centre."""
    image = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (width // 2, height // 3, width // 2 + 10, height // 3 + 10))
    return image


def blue(image: Image.Image) -> np.ndarray:
    """Where the block is: [height, width] of bool."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return (pixels[..., 2] > 180) & (pixels[..., 0] < 100)


@given(st.integers(0, 2**62), st.integers(0, 10**6))
def test_a_seed_gives_one_view(view: int, row: int) -> None:
    first, again = (random_view(drawing(), AugmentConfig(), seed=(view, row)) for _ in range(2))
    assert (first.mode, first.size) == ("RGB", (40, 30))
    assert first.tobytes() == again.tobytes()


def test_nothing_asked_for_changes_nothing_but_transparency() -> None:
    view = np.asarray(random_view(drawing(), STILL, seed=(1, 2), background=(9, 8, 7)))
    assert (view[0, 0] == (9, 8, 7)).all()
    np.testing.assert_array_equal(blue(Image.fromarray(view)), blue(drawing()))


def test_a_shift_moves_and_a_zoom_grows_the_drawing() -> None:
    shifted = blue(random_view(drawing(), STILL.model_copy(update={"shift": 0.2}), seed=(3, 3)))
    centre, before = (np.argwhere(mask).mean(axis=0) for mask in (shifted, blue(drawing())))
    assert 0 < np.abs(centre - before).max() <= 0.2 * 40 + 1
    grown = blue(random_view(drawing(), STILL.model_copy(update={"scale": [1.5, 1.5]}), seed=(3, 3)))
    assert grown.sum() == pytest.approx(1.5**2 * blue(drawing()).sum(), rel=0.15)


def test_a_turn_goes_both_ways_and_colours_keep_their_hue() -> None:
    turned = STILL.model_copy(update={"rotation": 30})
    heights = [np.argwhere(blue(random_view(drawing(80, 80), turned, seed=(s,)))).mean(axis=0)[0] for s in range(12)]
    still = np.argwhere(blue(drawing(80, 80))).mean(axis=0)[0]
    assert min(heights) < still - 0.5
    assert max(heights) > still + 0.5
    coloured = np.asarray(random_view(drawing(), STILL.model_copy(update={"colour": 0.4}), seed=(5,))).astype(int)
    block = coloured[15, 25]
    assert tuple(block) != (0, 0, 255)
    assert block[2] > block[0] + 60
    assert abs(block[0] - block[1]) <= 2


def samples(root, directory, *, augment, cached, seed=0) -> Samples:
    vlm = build_vlm(root)
    front = FrozenFront(vlm.vpg, "patches", dtype=torch.float32)
    data, bad = mixtures()["train"], BadSamples(0.0)
    return Samples(data, front, vlm.splice.prompter, bad=bad, cached=cached, augment=augment, seed=seed,
                   directory=directory)  # fmt: skip


def test_fixed_views_are_the_same_from_the_cache_and_live(root, tmp_path) -> None:
    config = AugmentConfig(views=2)
    rows, positions = [3, 1, 3, 3, 3], [0, 1, 2, 3, 4]
    stored, live = (samples(root, tmp_path, augment=config, cached=cached) for cached in (True, False))
    stored.prepare(rows, "images", positions=positions)
    found = stored.fetch(rows, positions=positions).inputs
    torch.testing.assert_close(found, live.fetch(rows, positions=positions).inputs, atol=1e-5, rtol=1e-4)
    distinct = {tuple(features.flatten()[:8].tolist()) for features in found[[0, 2, 3, 4]]}
    assert len(distinct) == 2  # of one image, its two views
    plain = live.fetch(rows[:1]).inputs
    assert not torch.allclose(plain, found[:1], atol=1e-3)  # without a position: the image as it is


def test_without_a_number_every_sight_is_new_and_the_seed_counts(root, tmp_path) -> None:
    config = AugmentConfig()
    live, other = (samples(root, tmp_path, augment=config, cached=False, seed=seed) for seed in (0, 1))
    found = torch.cat([each.fetch([3] * 4, positions=range(4)).inputs for each in (live, other)])
    assert len({tuple(features.flatten()[:8].tolist()) for features in found}) == 8


def test_the_cache_key_holds_view_and_augmentation() -> None:
    source = Pictures(3)
    made = [(AugmentConfig(), 1), (AugmentConfig(), 2), (AugmentConfig(shift=0.1), 1)]
    prints = {View(source, config, view, background=(255,) * 3).fingerprint for config, view in made}
    assert len(prints | {source.fingerprint}) == 4
    few, many = (View(source, AugmentConfig(views=n), 1, background=(255,) * 3).fingerprint for n in (2, 4))
    assert few == many  # more views leave those that are there


def test_augmentation_changes_training_and_not_the_zeroth_validation(root, tmp_path) -> None:
    stage = {**FINETUNE, "augment": True}
    entry = [{"dataset": "unused"}]
    ends, first = [], []
    for name, augment in (("plain", None), ("fixed", {"views": 2}), ("fixed again", {"views": 2}), ("live", {})):
        vlm = build_vlm(root)
        recipe = make_recipe([stage], data={"train": entry, "validation": entry, "augment": augment})
        train(vlm, recipe, tmp_path / name)
        ends.append(vlm.vpg.connector.queries.detach().clone())
        first.append(next(line["val_loss"] for line in lines(tmp_path / name / "metrics.jsonl") if "val_loss" in line))
    assert first[0] == first[1] == first[2] == pytest.approx(first[3], rel=1e-2)  # live features are not rounded
    assert torch.equal(ends[1], ends[2])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[3])


def test_a_resumed_stage_sees_the_views_it_would_have_seen(root, tmp_path) -> None:
    stage = make_recipe([FINETUNE]).stages[0]
    made = samples(root, tmp_path, augment=AugmentConfig(views=3), cached=False)
    draws = SampleDraws(made.mixture, seed=0, stage=stage, first_sample=8)
    straight = list(Updates(made, draws, start=0, stop=4))
    later = list(Updates(made, draws, start=2, stop=4))
    for expected, found in zip(straight[2:], later, strict=True):
        assert expected.ids == found.ids
        assert torch.equal(expected.inputs, found.inputs)
