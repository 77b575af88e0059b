"""The order of a mixture: every source has its share, every sample its turn, and a run goes on anywhere."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import CAPTIONS, IMAGES, write_jsonl, write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from vpgtrans.data.config import DataSource
from vpgtrans.data.formats import Opened
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.rows import ListRows
from vpgtrans.data.sources import Source
from vpgtrans.errors import DataError


class StretchedRows(ListRows):
    """Records whose rows are cheap to read in stretches only."""

    starts: np.ndarray
    side: int

    @property
    def stretches(self) -> np.ndarray:
        return self.starts

    @property
    def window(self) -> int:
        return self.side


def plain(size: int, name: str = "s", *, weights: list[float] | None = None, limit: int | None = None) -> Source:
    """Texts that say where they stand."""
    rows = ListRows([{"text": f"{name}{row}"} for row in range(size)], name)
    source = Source(Opened(rows, None, DataSource(dataset=name, text="text", limit=limit)))
    if weights is not None:
        source.weights = np.asarray(weights)
    return source


def stretched(lengths: list[int], window: int, name: str = "s", *, limit: int | None = None) -> Source:
    source = plain(sum(lengths), name, limit=limit)
    rows = StretchedRows(source.rows.records, name)
    rows.starts, rows.side = np.cumsum([0, *lengths[:-1]]), window
    source.rows = rows
    return source


lengths = st.lists(st.integers(1, 7), min_size=1, max_size=8)
kinds = st.one_of(
    st.builds(plain, st.integers(1, 30)),
    st.builds(stretched, lengths, st.integers(0, 3)),
)
shares = st.floats(min_value=0.05, max_value=20)
mixtures = st.lists(st.tuples(kinds, shares), min_size=1, max_size=4).map(Mixture)
seeds = st.integers(0, 2**32)


def counted(mixture: Mixture, drawn: np.ndarray) -> list[np.ndarray]:
    """How often each row came, source by source."""
    counts = np.bincount(drawn, minlength=len(mixture))
    return np.split(counts, np.cumsum([len(source) for source in mixture.sources])[:-1])


# --- shares -------------------------------------------------------------------------------------


@settings(deadline=None)
@given(mixtures, seeds, st.integers(0, 5))
def test_an_epoch_gives_every_source_its_share_to_a_draw(mixture: Mixture, seed: int, epoch: int):
    order = mixture.order(seed, epoch)
    assert order.dtype == np.int64
    assert len(order) == len(mixture)
    for rows, share in zip(counted(mixture, order), mixture.shares, strict=True):
        assert abs(rows.sum() - share * len(mixture)) < 1 + 1e-6


@settings(deadline=None)
@given(mixtures, seeds, st.integers(1, 200))
def test_every_row_of_a_source_comes_as_often_as_the_others(mixture: Mixture, seed: int, draws: int):
    for rows in counted(mixture, mixture.draws(seed, 0, draws)):
        assert rows.max() - rows.min() <= 1


@settings(deadline=None)
@given(kinds, seeds, st.integers(0, 3))
def test_one_source_is_permuted(source: Source, seed: int, epoch: int):
    assert sorted(Mixture([(source, 3.0)]).order(seed, epoch)) == list(range(len(source)))


def test_small_shares_add_up_over_epochs():
    mixture = Mixture([(plain(10, "a"), 1.0), (plain(10, "b"), 0.01), (plain(10, "c"), 0.02)])
    whole = mixture.draws(0, 0, 300 * len(mixture))
    for rows, share in zip(counted(mixture, whole), mixture.shares, strict=True):
        assert abs(rows.sum() - share * len(whole)) < 2


def test_shares_hold_within_an_epoch_too():
    mixture = Mixture([(plain(3000, "a"), 3.0), (plain(1000, "b"), 1.0)])
    parts = np.split(mixture.order(0, 0) < 3000, 10)
    assert max(abs(part.mean() - 0.75) for part in parts) < 0.1


def test_rows_with_weights_of_their_own():
    weights = [3.0] * 5 + [1.0] * 25
    mixture = Mixture([(plain(10, "a"), 3.0), (plain(30, "b", weights=weights), 1.0)])
    counts = Counter(mixture.draws(0, 0, 4000).tolist())
    assert sum(counts[row] for row in range(10)) / 4000 == pytest.approx(0.75, abs=0.001)
    heavy = sum(counts[row] for row in range(10, 15)) / 5
    light = sum(counts[row] for row in range(15, 40)) / 25
    assert heavy / light == pytest.approx(3, rel=0.1)


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), seeds)
def test_an_epoch_of_weighted_rows_rounds_each_count(weights: list[float], seed: int):
    mixture = Mixture([(plain(len(weights), weights=weights), 1.0)])
    expected = np.asarray(weights) / sum(weights) * len(weights)
    counts = np.bincount(mixture.order(seed, 0), minlength=len(weights))
    assert (counts >= np.floor(expected - 1e-9)).all()
    assert (counts <= np.ceil(expected + 1e-9)).all()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_none(weight: float):
    with pytest.raises(DataError, match="b: the weight of a source must be above zero"):
        Mixture([(plain(2, "a"), 1.0), (plain(2, "b"), weight)])
    with pytest.raises(DataError, match="at least one source"):
        Mixture([])


# --- going on -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(mixtures, st.integers(0, 100), st.integers(0, 150), st.integers(1, 17))
def test_batches_go_on_anywhere(mixture: Mixture, seed: int, start: int, batch_size: int):
    whole = mixture.draws(seed, 0, start + 60)
    again = pickle.loads(pickle.dumps(mixture))
    drawn = [again.draws(seed, first, first + batch_size) for first in range(start, start + 60, batch_size)]
    assert {batch.shape for batch in drawn} == {(batch_size,)}
    assert np.concatenate(drawn)[:60].tolist() == whole[start:].tolist()
    epoch, offset = divmod(start, len(mixture))
    assert whole[start] == mixture.order(seed, epoch)[offset]


def test_seeds_and_epochs_differ():
    for sources in ([(plain(50), 1.0)], [(plain(50, "a"), 1.0), (stretched([5] * 10, 2, "b"), 1.0)]):
        mixture = Mixture(sources)
        orders = [tuple(mixture.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
        assert len(set(orders)) == 4
        assert tuple(mixture.order(0, 0)) == orders[0]


def test_equal_sources_have_orders_of_their_own():
    mixture = Mixture([(plain(50, "a"), 1.0), (plain(50, "b"), 1.0)])
    drawn = mixture.order(0, 0)
    assert drawn[drawn < 50].tolist() != (drawn[drawn >= 50] - 50).tolist()


def test_nothing_drawn():
    mixture = Mixture([(plain(5), 1.0)])
    assert mixture.draws(0, 3, 3).tolist() == []


# --- stretches ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(lengths, st.integers(1, 4), seeds, st.integers(1, 60))
def test_stretches_are_read_a_window_at_a_time(parts: list[int], window: int, seed: int, limit: int):
    source = stretched(parts, window, limit=limit)
    order = Mixture([(source, 1.0)]).order(seed, 0)
    assert sorted(order) == list(range(len(source)))
    stretch = np.searchsorted(source.rows.stretches, order, side="right") - 1
    met = list(dict.fromkeys(stretch.tolist()))
    last = {place: np.flatnonzero(stretch == place).max() for place in met}
    first = {place: np.flatnonzero(stretch == place).min() for place in met}
    # at any time no more stretches are begun and not yet through than the window allows
    for place in met:
        begun = [other for other in met if first[other] <= first[place] <= last[other]]
        assert len(begun) <= window


def test_a_stream_keeps_the_order_of_its_stretches_and_shuffles_within():
    order = Mixture([(stretched([10] * 5, 0), 1.0)]).order(0, 0)
    assert (order // 10).tolist() == sorted((order // 10).tolist())
    assert order.tolist() != sorted(order.tolist())


def test_windows_shuffle_stretches_and_rows():
    order = Mixture([(stretched([10] * 10, 2), 1.0)]).order(0, 0)
    first = order[:20] // 10
    assert len(set(first.tolist())) == 2
    assert first.tolist() != sorted(first.tolist())
    assert first.tolist() != sorted(first.tolist(), reverse=True)


# --- samples ------------------------------------------------------------------------------------


def test_samples_know_their_source():
    a, b = plain(2, "a"), plain(3, "b")
    mixture = Mixture([(a, 1.0), (b, 1.0)])
    assert [mixture.caption(sample) for sample in range(5)] == ["a0", "a1", "b0", "b1", "b2"]
    assert mixture.locate(2) == (b, 0)
    assert [mixture.id(1), mixture.sample(4).id] == ["a/1", "b/2"]
    for sample in (-1, 5):
        with pytest.raises(IndexError):
            mixture.locate(sample)


@settings(deadline=None)
@given(mixtures, st.integers(1, 60), seeds)
def test_some_samples_are_different_ones_and_the_same_every_time(mixture: Mixture, count: int, seed: int):
    chosen = mixture.some(count, seed=seed)
    assert chosen == mixture.some(count, seed=seed)
    assert len(set(chosen)) == len(chosen) <= count
    assert all(0 <= sample < len(mixture) for sample in chosen)
    assert chosen


def test_some_samples_of_a_long_stream_come_from_its_beginning():
    source = stretched([100] * 50, 0)
    assert max(Mixture([(source, 1.0)]).some(100, seed=0)) < 200
    assert max(Mixture([(plain(5000), 1.0)]).some(100, seed=0)) > 3000


def test_readable_samples_and_what_they_say():
    source = Source(Opened(ListRows([{"text": "x"}, {"text": 7}, {"text": ""}], "s"), None,
                           DataSource(dataset="s", text="text")))  # fmt: skip
    mixture = Mixture([(source, 1.0)])
    assert [sample.row for sample in mixture.readable(range(3))] == [0]
    assert list(mixture.captions(10)) == ["x"]
    with pytest.raises(DataError, match="s, row 2: no text"):
        list(mixture.readable([1, 2]))


def test_sources_of_a_recipe(tmp_path: Path):
    table = write_parquet(tmp_path / "a.parquet", group=1, image=IMAGES, caption=CAPTIONS)
    lines = write_jsonl(tmp_path / "b.jsonl", *({"text": f"t{row}"} for row in range(9)))

    def mixture(weight: float) -> Mixture:
        return open_mixture(
            [DataSource(dataset=str(table), weight=weight), DataSource(dataset=str(lines), text="text")]
        )

    first = mixture(3.0)
    assert first.shares.tolist() == [0.75, 0.25]
    assert [first.sample(sample).references[0] for sample in (0, 3)] == [CAPTIONS[0], "t0"]
    again = pickle.loads(pickle.dumps(first))
    assert again.draws(0, 5, 40).tolist() == first.draws(0, 5, 40).tolist()
    assert again.sample(11) == first.sample(11)
