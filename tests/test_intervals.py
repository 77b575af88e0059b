"""Bootstrap intervals against theory, and where they appear."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpgtrans.evaluation.intervals import ratio_interval
from vpgtrans.runs.answers import Answers, scores


def test_the_means_interval_is_the_normal_one_for_many_samples():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=2000)
    low, high = ratio_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        tokens = random.integers(1, 9, size=60)
        nll = tokens * 1.5 + random.normal(0, 1, size=60) * np.sqrt(tokens)
        low, high = ratio_interval(nll, tokens, seed=trial, resamples=400)
        held += low <= 1.5 <= high
    assert 180 <= held <= 199


def test_weights_count_a_sample_as_often_as_it_has_tokens():
    low, high = ratio_interval([100.0, 1.0], [100, 1])
    assert low == high == 1.0  # a mean of the two ratios 1 and 1, however they are drawn
    low, high = ratio_interval([200.0, 1.0], [100, 1])
    assert low == 1.0
    assert high == 2.0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.integers(0, 3))
def test_ends_lie_in_order_within_the_values_and_repeat(values, seed):
    low, high = ratio_interval(values, seed=seed, resamples=50)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert ratio_interval(values, seed=seed, resamples=50) == (low, high)


def test_scores_give_each_mean_and_the_losses_interval():
    said = Answers(rows=[0, 1], predictions=["a cat", "a dog"], references=[["a cat"], ["a hen"]])
    found = scores(said)
    assert found["count"] == 2
    assert found["exact_match"] == 0.5
    assert set(found["intervals"]) == {"exact_match", "token_f1", "cider"}
    assert found["intervals"]["exact_match"] == [0.0, 1.0]
    said.nll, said.tokens = [2.0, 6.0], [1.0, 3.0]
    assert scores(said)["val_loss"] == 2.0
    assert scores(said)["intervals"]["val_loss"] == [2.0, 2.0]
    assert scores(Answers()) == {"count": 0}
