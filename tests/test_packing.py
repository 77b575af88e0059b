"""Packing: every sample once, no limit passed, never more packs than first-fit decreasing, the same packs each time."""

import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgtrans.data import pack_search
from vpgtrans.data.pack_search import Limits, first_fit, lower_bound, sort_items
from vpgtrans.data.packing import PackPlan, PlanKey, StreamPacker, fewest_packs, pack
from vpgtrans.errors import DataError, IntegrityError
from vpgtrans.files import key_digest

KEY = PlanKey("data", "tokenizer", "prompt", "576", 100, 8)


@st.composite
def problems(draw):
    """Lengths, images and limits; from few different samples to many."""
    max_tokens = draw(st.integers(1, 120))
    longest = draw(st.integers(1, 130))
    shortest = draw(st.integers(1, longest))
    count = draw(st.integers(0, 150))
    lengths = draw(st.lists(st.integers(shortest, longest), min_size=count, max_size=count))
    limits = {"max_tokens": max_tokens}
    if draw(st.booleans()):
        limits["images"] = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
        limits["max_images"] = draw(st.none() | st.integers(1, 9))
    limits["max_samples"] = draw(st.none() | st.integers(1, 9))
    return lengths, limits


def naive_first_fit(lengths, *, max_tokens, images=None, max_images=None, max_samples=None):
    """The number of packs of first-fit decreasing, sample by sample."""
    images = images or [0] * len(lengths)
    most = (max_tokens, max_images or 10**9, max_samples or 10**9)
    packs: list[list[int]] = []
    for tokens, shown in sorted(zip(lengths, images, strict=True), reverse=True):
        if tokens > most[0] or shown > most[1]:
            continue
        use = (tokens, shown, 1)
        for held in packs:
            if all(h + u <= m for h, u, m in zip(held, use, most, strict=True)):
                break
        else:
            packs.append(held := [0, 0, 0])
        held[:] = [h + u for h, u in zip(held, use, strict=True)]
    return len(packs)


def packs_of(plan: PackPlan) -> list[list[int]]:
    return [plan.pack(number).tolist() for number in range(len(plan))]


def check(packs, dropped, lengths, limits):
    """Every sample is in one pack, or passes a limit alone; no pack passes one."""
    images = limits.get("images") or [0] * len(lengths)
    most_images, most_samples = limits.get("max_images") or 10**9, limits.get("max_samples") or 10**9
    too_much = [i for i, n in enumerate(lengths) if n > limits["max_tokens"] or images[i] > most_images]
    assert sorted(dropped) == too_much
    assert sorted([*dropped, *(sample for held in packs for sample in held)]) == list(range(len(lengths)))
    for held in packs:
        assert 0 < len(held) <= most_samples
        assert sum(lengths[sample] for sample in held) <= limits["max_tokens"]
        assert sum(images[sample] for sample in held) <= most_images


@settings(max_examples=150, deadline=None)
@given(problems())
def test_every_sample_is_in_one_pack_and_there_are_no_more_than_first_fit_makes(problem):
    lengths, limits = problem
    plan = pack(lengths, **limits)
    check(packs_of(plan), plan.dropped.tolist(), lengths, limits)
    assert len(plan) <= naive_first_fit(lengths, **limits)
    assert len(plan) >= fewest_packs(lengths, max_tokens=limits["max_tokens"]) or plan.images.any()
    again = pack(lengths, **limits)
    assert np.array_equal(plan.order, again.order)
    assert np.array_equal(plan.starts, again.starts)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 9))
def test_a_part_of_the_samples_gives_packs_for_all(problem, packs):
    """What a large set does: neighbours in length take the places of one."""
    lengths, limits = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_search, "PACKS", packs)
        plan = pack(lengths, **limits)
    check(packs_of(plan), plan.dropped.tolist(), lengths, limits)
    assert len(plan) <= naive_first_fit(lengths, **limits)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_first_fit_by_length_is_first_fit_by_sample(problem):
    lengths, limits = problem
    images = limits.get("images") or [0] * len(lengths)
    most = Limits(limits["max_tokens"], limits.get("max_images") or 10**9, limits.get("max_samples") or 10**9)
    fits = [i for i, n in enumerate(lengths) if n <= most.tokens and images[i] <= most.images]
    items = sort_items(np.array(fits, dtype=int), *(np.array(x, dtype=int)[fits] for x in (lengths, images)))
    found = first_fit(items, most)
    assert found.max(initial=-1) + 1 == naive_first_fit(lengths, **limits)


@pytest.mark.parametrize(
    ("lengths", "fewest"),
    [
        ([60] * 10, 10),  # none fits beside another: L2
        ([21] * 100, 25),  # four a pack, whatever the sum says: dual feasible functions
        ([70, 31] * 4, 6),  # the short ones don't fit beside the long ones, but share
        ([50] * 9, 5),
        ([1] * 1000, 10),
    ],
)
def test_no_packing_goes_below_the_bound(lengths, fewest):
    items = sort_items(np.arange(len(lengths)), np.array(lengths), np.zeros(len(lengths), dtype=int))
    bound = lower_bound(items, Limits(100, 10**9, 10**9))
    made = len(pack(lengths, max_tokens=100))
    assert bound == fewest == made


def test_packs_are_full_where_first_fit_leaves_four_in_a_hundred_tokens():
    generator = np.random.default_rng(0)
    lengths = (576 + generator.lognormal(5, 0.8, 20_000)).astype(int).clip(max=4096)
    plan = pack(lengths, max_tokens=4096)
    assert naive_fill(lengths) < 0.96
    assert plan.statistics["fill"] > 0.99
    assert len(plan) < 1.006 * fewest_packs(lengths, max_tokens=4096)


def naive_fill(lengths) -> float:
    items = sort_items(np.arange(len(lengths)), lengths, np.zeros_like(lengths))
    return lengths.sum() / ((first_fit(items, Limits(4096, 10**9, 10**9)).max() + 1) * 4096)


def test_a_million_samples_take_memory_in_proportion():
    generator = np.random.default_rng(0)
    lengths = generator.integers(100, 3000, 1_000_000).astype(np.int32)
    tracemalloc.start()
    plan = pack(lengths, max_tokens=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * len(lengths)
    assert plan.statistics["samples"] == 1_000_000
    assert np.array_equal(np.sort(plan.order), np.arange(1_000_000))


def test_one_pack_of_many_short_samples_makes_no_table_of_all_packs_as_wide():
    lengths = np.concatenate([np.full(20_000, 1), np.random.default_rng(0).integers(1500, 3000, 4000)])
    tracemalloc.start()
    pack(lengths, max_tokens=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_statistics():
    plan = pack([60, 40, 50, 101, 10], max_tokens=100, images=[1, 2, 0, 1, 9], max_images=8)
    assert plan.dropped.tolist() == [3, 4]
    assert plan.statistics == {
        "fill": 0.75,
        "packs": 2,
        "samples": 3,
        "tokens": 150,
        "dropped": 2,
        "tokens_per_pack": 75,
        "images_per_pack": 1.5,
        "samples_per_pack": 1.5,
    }
    nothing = pack([200], max_tokens=100)
    assert (nothing.statistics["packs"], nothing.statistics["dropped"], nothing.statistics["fill"]) == (0, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 9, "max_images": 0}, "max_images is 0"),
        ({"max_tokens": 9, "max_samples": -1}, "max_samples is -1"),
        ({"max_tokens": 9, "images": [1]}, r"lengths \(2,\) and images \(1,\)"),
        ({"max_tokens": 9, "images": [1, -1]}, "sample 1 has 4 tokens and -1 images"),
    ],
)
def test_bad_limits_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        pack([3, 4], **arguments)


def test_a_sample_without_tokens_is_refused():
    with pytest.raises(DataError, match="sample 1 has 0 tokens"):
        pack([3, 0], max_tokens=9)
    with pytest.raises(DataError, match="window is 0"):
        StreamPacker(max_tokens=9, window=0)
    with pytest.raises(DataError, match="sample 0 has 0 tokens"):
        StreamPacker(max_tokens=9).add(0)


# --- file ---------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path):
    plan = pack([60, 40, 50, 101, 10], max_tokens=100, images=[1, 2, 0, 1, 0])
    path = tmp_path / "plans" / "plan.safetensors"
    plan.save(path, KEY)
    again = PackPlan.load(path, KEY)
    assert packs_of(again) == packs_of(plan)
    assert again.statistics == plan.statistics
    assert [file.name for file in path.parent.iterdir()] == ["plan.safetensors"]


@pytest.mark.parametrize(
    "change", ["data", "tokenizer", "prompt", "visual_tokens", "max_tokens", "max_images", "max_samples"]
)
def test_a_plan_of_something_else_is_refused(tmp_path, change):
    pack([60, 40], max_tokens=100).save(tmp_path / "plan", KEY)
    other = replace(KEY, **{change: 7 if change.startswith("max") else "another"})
    assert key_digest(asdict(other)) != key_digest(asdict(KEY))
    with pytest.raises(DataError, match=f"with another {change}: remove it"):
        PackPlan.load(tmp_path / "plan", other)


def test_a_damaged_plan_is_refused(tmp_path):
    path = tmp_path / "plan"
    with pytest.raises(DataError, match="there is no pack plan here"):
        PackPlan.load(path, KEY)
    pack(list(range(1, 60)), max_tokens=100).save(path, KEY)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:-3] + b"\7\7\7", b"", b"nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match="damaged"):
            PackPlan.load(path, KEY)


# --- stream -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(1, 40))
def test_a_stream_loses_nothing_and_holds_no_more_than_its_window(problem, window):
    lengths, limits = problem
    images = limits.get("images") or [0] * len(lengths)

    def run():
        packer = StreamPacker(window=window, **{key: value for key, value in limits.items() if key != "images"})
        packs = []
        for tokens, shown in zip(lengths, images, strict=True):
            packs += [held.tolist() for held in packer.add(tokens, shown)]
            assert packer.held < window
        packs += [held.tolist() for held in packer.finish()]
        assert packer.held == 0
        return packs, packer

    packs, packer = run()
    dropped = set(range(len(lengths))) - {sample for held in packs for sample in held}
    assert (packer.dropped, packer.seen) == (len(dropped), len(lengths))
    check(packs, dropped, lengths, limits)
    assert run()[0] == packs


def test_carrying_over_fills_packs_of_a_stream_better_and_no_sample_stays_for_long():
    generator = np.random.default_rng(0)
    lengths = (576 + generator.lognormal(5, 0.8, 6000)).astype(int).clip(max=4096)

    def waits(stays):
        packer = StreamPacker(max_tokens=4096, window=500)
        packer.STAYS = stays
        packs, longest = 0, 0
        for tokens in lengths.tolist():
            for held in packer.add(tokens):
                packs += 1
                longest = max(longest, packer.seen - int(held.min()))
        return packs + len(list(packer.finish())), longest

    (alone, _), (carried, longest) = waits(0), waits(4)
    assert carried < alone
    assert longest <= 5 * 500
    assert lengths.sum() / (carried * 4096) > 0.97
