"""Packs in the order of a run: what is drawn, what is kept on disk, what is refused."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_tokenizer

from vpgtrans.config import PromptConfig
from vpgtrans.data.config import DataSource, PackingConfig
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.packing import LengthKey
from vpgtrans.data.packs import BAD, LEFT_OUT, Lengths, PackOrder, in_a_batch, measure, plan_packs
from vpgtrans.errors import DataError, IntegrityError, RecipeError
from vpgtrans.prompts import Prompter
from vpgtrans.training.config import Stage
from vpgtrans.training.draws import PackDraws

KEY = LengthKey("data", "tokenizer", "prompt", "4")


class Even:
    """What a mixture is to an order of packs: every epoch draws each sample once."""

    even, reach = True, None

    def __init__(self, count: int):
        self.count = count

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(self.count)


class Weighted(Even):
    """Some samples come more often than others."""

    even = False

    def order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).choice(self.count, self.count)


class Streamed(Even):
    """Rows are read forwards."""

    even = False

    @property
    def reach(self) -> int:  # type: ignore[override]
        return 10


def made(lengths: list[int], limits: PackingConfig, kind: type[Even], *, seed: int = 0) -> PackOrder:
    tokens = np.array(lengths, dtype=np.int32)
    table = Lengths(tokens, np.ones_like(tokens), KEY)
    mixture: Any = kind(len(lengths))
    return PackOrder(mixture, table, table.plan(limits), limits, seed=seed)


def stage(batch_size: int) -> Stage:
    return Stage.model_validate(
        {"name": "s", "trainable": {"projector": "full"}, "budget": {"samples": 9}, "batch_size": batch_size}
    )


def test_a_sample_that_is_none_is_never_in_a_pack():
    with pytest.raises(ValueError, match="less than or equal to 1073741824"):
        PackingConfig(max_tokens=BAD)


some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=60).filter(lambda lengths: min(lengths) <= 40)


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.sampled_from([Even, Weighted, Streamed]), st.integers(0, 3), st.integers(1, 4))
def test_an_epoch_holds_what_it_draws_and_no_pack_passes_a_limit(lengths, kind, seed, most):
    limits = PackingConfig(max_tokens=40, max_samples=most)
    order = made(lengths, limits, kind, seed=seed)
    drawn_before = 0
    for epoch in range(3):
        draws = order.mixture.order(seed, epoch)
        fitting = Counter(sample for sample in draws.tolist() if lengths[sample] <= 40)
        if not fitting:  # of weighted draws
            return
        drawn: Counter[int] = Counter()
        number = drawn_before
        while sum(drawn.values()) < sum(fitting.values()):
            [pack] = order.packs(number, number + 1)
            assert 0 < len(pack) <= most
            assert sum(lengths[sample] for sample in pack) <= 40
            drawn.update(pack.tolist())
            number += 1
        assert drawn == fitting
        drawn_before = number


@settings(max_examples=40, deadline=None)
@given(some_lengths, st.sampled_from([Even, Streamed]), st.integers(0, 30), st.integers(0, 30))
def test_a_run_goes_on_in_the_middle_of_an_epoch_on_the_same_pack(lengths, kind, start, count):
    limits = PackingConfig(max_tokens=40)
    whole = made(lengths, limits, kind).packs(0, start + count)
    later = made(lengths, limits, kind).packs(start, start + count)
    assert [pack.tolist() for pack in later] == [pack.tolist() for pack in whole[start:]]


def test_epochs_and_seeds_differ_and_neighbours_are_shuffled():
    lengths = [40] * 30 + [8] * 50
    orders = [made(lengths, PackingConfig(max_tokens=40), Even, seed=seed).packs(0, 80) for seed in (0, 1)]
    plain = [[pack.tolist() for pack in order] for order in orders]
    assert plain[0][:40] != plain[0][40:]
    assert sorted(plain[0][:40]) == sorted(plain[0][40:])
    assert plain[0] != plain[1]
    sizes = [len(pack) for pack in orders[0][:40]]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))


def test_what_is_read_forwards_is_packed_with_what_is_near():
    order = made([13, 27] * 100, PackingConfig(max_tokens=40), Streamed)
    places = {sample: place for place, sample in enumerate(order.mixture.order(0, 0).tolist())}
    packs = order.packs(0, 100)
    assert max(max(places[s] for s in pack) - min(places[s] for s in pack) for pack in packs) <= 40
    assert np.mean([len(pack) for pack in packs]) > 1.8


@settings(max_examples=60, deadline=None)
@given(some_lengths, st.integers(1, 12), st.integers(1, 5), st.integers(0, 5))
def test_ranks_get_as_many_packs_and_together_the_update(lengths, batch_size, world, number):
    limits = in_a_batch(PackingConfig(max_tokens=40), batch_size)
    draws = PackDraws(made(lengths, limits, Even), stage=stage(batch_size))
    if draws.packs % world:
        with pytest.raises(RecipeError, match=rf"{draws.packs} pack\(s\).*{world} devices can't share evenly"):
            draws.check(world)
        return
    draws.check(world)
    whole = draws.update(number)
    ranks = [draws.update(number, rank=rank, world=world) for rank in range(world)]
    assert {len(set(own.packs.tolist())) for own in ranks} == {draws.packs // world}
    together = np.concatenate([own.rows for own in ranks])
    assert sorted(together.tolist()) == sorted(whole.rows.tolist())
    assert sorted(np.concatenate([own.positions for own in ranks])) == sorted(whole.positions)
    assert len(set(whole.positions.tolist())) == len(whole.rows)
    assert max(Counter(whole.packs.tolist()).values()) <= batch_size


@pytest.mark.parametrize(
    ("lengths", "batch_size", "world"),
    [([10] * 64, 16, 4), ([2, 3, 4] * 30, 4, 2), ([2, 3, 4] * 30, 21, 5), ([40] * 9, 7, 3), ([30, 9, 1] * 20, 4, 3)],
    ids=["full by tokens", "full by samples", "not divisible", "two fit", "uneven"],
)
def test_the_advice_to_devices_that_cannot_share_is_right(lengths, batch_size, world):
    def draws(size: int, **more: int) -> PackDraws:
        limits = in_a_batch(PackingConfig(max_tokens=80, **more), size)
        return PackDraws(made(lengths, limits, Even), stage=stage(size))

    with pytest.raises(RecipeError) as raised:
        draws(batch_size).check(world)
    said = re.search(r"right would be (?:batch_size: (\d+) with )?data.packing.max_samples: (\d+)$", str(raised.value))
    assert said is not None
    draws(int(said[1] or batch_size), max_samples=int(said[2])).check(world)


# --- on disk --------------------------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows: list[dict[str, Any]] = [{"image": "a.png", "caption": "and " * (1 + row % 7)} for row in range(40)]
    rows += [{"image": "a.png", "caption": None}, {"image": "a.png", "caption": 3}]
    rows += [{"image": "a.png", "caption": "x " * 99}]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_mixture([DataSource(dataset=str(table))])


def prompter(**prompt: Any) -> Prompter:
    return Prompter(tiny_tokenizer(), PromptConfig(**prompt), visual_tokens=4)


def test_lengths_are_those_of_the_samples_and_are_kept(mixture, tmp_path, monkeypatch):
    found = measure(mixture, prompter(), directory=tmp_path / "packs")
    expected = [len(prompter().encode(mixture.sample(row).text)) for row in range(40)]
    assert found.tokens[:40].tolist() == expected
    assert found.tokens[40:42].tolist() == [LEFT_OUT, BAD]
    assert (found.left_out, found.bad) == (1, 1)
    assert found.over_long(PackingConfig(max_tokens=64)).tolist() == [42]
    monkeypatch.setattr(Prompter, "encode", None)  # nothing is counted again
    again = measure(mixture, prompter(), directory=tmp_path / "packs")
    assert again.tokens.tolist() == found.tokens.tolist()
    assert again.images.tolist() == found.images.tolist()
    with pytest.raises(TypeError):  # another prompt: it is
        measure(mixture, prompter(template="See <image>"), directory=tmp_path / "packs")


def test_an_interrupted_count_goes_on(mixture, tmp_path, monkeypatch):
    whole = measure(mixture, prompter(), directory=tmp_path / "whole")
    monkeypatch.setattr("vpgtrans.data.packs.KEPT_EVERY", 0.0)
    encode, counted = Mixture.encode, []

    def until(self: Mixture, row: int, own: Prompter) -> Any:
        counted.append(row)
        if counted == list(range(42)):
            raise KeyboardInterrupt
        return encode(self, row, own)

    monkeypatch.setattr(Mixture, "encode", until)
    with pytest.raises(KeyboardInterrupt):
        measure(mixture, prompter(), directory=tmp_path / "packs")
    found = measure(mixture, prompter(), directory=tmp_path / "packs")
    assert counted[42:] == [41, 42]
    assert (found.tokens.tolist(), found.reasons) == (whole.tokens.tolist(), whole.reasons)
    assert found.images.tolist() == whole.images.tolist()


def test_another_chat_template_gives_other_lengths(tmp_path):
    """A base model and its chat variant often share all else of a tokenizer."""
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    mixture = open_mixture([DataSource(dataset=str(tmp_path / "chats.jsonl"), conversation="messages")])
    lengths = []
    for words in ("", "I am a helpful assistant. "):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = words + "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        own = Prompter(tokenizer, PromptConfig(), visual_tokens=4)
        found = measure(mixture, own, directory=tmp_path / "packs").tokens.tolist()
        assert found == [len(own.encode(mixture.sample(0).text))]
        lengths.append(found)
    assert lengths[0] < lengths[1]


def test_a_damaged_file_is_no_plan(mixture, tmp_path):
    lengths = measure(mixture, prompter(), directory=tmp_path / "packs")
    _, path = plan_packs(lengths, PackingConfig(max_tokens=64), directory=tmp_path / "packs")
    kept = path.read_bytes()
    path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="the pack plan is damaged: remove it"):
        plan_packs(lengths, PackingConfig(max_tokens=64), directory=tmp_path / "packs")
    [table] = (tmp_path / "packs").glob("*.lengths.safetensors")
    table.write_bytes(table.read_bytes()[:100])
    with pytest.raises(IntegrityError, match="is no table of lengths, or damaged"):
        measure(mixture, prompter(), directory=tmp_path / "packs")


def test_nothing_fits(mixture, tmp_path):
    lengths = measure(mixture, prompter(), directory=tmp_path / "packs")
    with pytest.raises(DataError, match=r"no sample fits a pack of 2 tokens; the shortest has \d+"):
        plan_packs(lengths, PackingConfig(max_tokens=2), directory=tmp_path / "packs")


@pytest.mark.parametrize("kind", [Weighted, Streamed])
def test_nothing_that_is_drawn_fits(kind):
    """A source whose samples fit may be drawn less than once in an epoch."""
    order = made([50] * 20 + [5], PackingConfig(max_tokens=40), kind)
    order.mixture.order = lambda seed, epoch: np.arange(20)
    with pytest.raises(DataError, match="no sample of the first epoch fits a pack of 40 tokens"):
        PackDraws(order, stage=stage(4))
