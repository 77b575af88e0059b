"""Caption metrics against stored outputs of the reference implementation, by hand, and by their invariants."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpgtrans.errors import DataError
from vpgtrans.evaluation.metrics import (
    cider,
    exact_match,
    match_parts,
    score,
    token_f1,
    tokenize,
)

REFERENCE = json.loads((Path(__file__).parent / "data/cider_reference.json").read_text())
vocabulary = ["a", "cat", "dog", "on", "the", "mat", "red", "skin-tone", "it's"]
words = st.lists(st.sampled_from(vocabulary), min_size=1, max_size=8)
texts = words.map(" ".join)
samples = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=8)


@pytest.mark.parametrize("case", REFERENCE["cases"])
def test_cider_equals_the_reference_implementation(case: dict):
    scores = cider(case["predictions"], case["references"])
    np.testing.assert_allclose(scores, case["scores"], rtol=1e-10, atol=1e-12)
    assert np.mean(scores) == pytest.approx(case["mean"], rel=1e-10)


def test_the_reference_cases_say_something():
    means = [case["mean"] for case in REFERENCE["cases"]]
    assert len(means) == 30
    assert sum(mean > 1 for mean in means) > 15
    assert len(set(means)) > 20


def test_tokens():
    assert tokenize("A T-Rex, at eight o’clock (8:30)!") == ["a", "t-rex", "at", "eight", "o'clock", "8", "30"]
    assert tokenize("«Bær» ?!") == ["bær"]
    assert tokenize("") == []


def test_exact_match():
    predictions = ["Woman pilot.", "woman  pilot dark", "pilot woman", ""]
    assert exact_match(predictions, [["woman pilot"]] * 4) == [1, 0, 0, 0]
    assert exact_match(["b"], [["a", "b"]]) == [1]


def test_token_f1():
    assert token_f1(["a b c"], [["a b d e"]]) == [pytest.approx(2 * 2 / (3 + 4))]
    assert token_f1(["a a"], [["a"]]) == [pytest.approx(2 / 3)]
    assert token_f1(["a b"], [["c", "b a"]]) == [1]
    assert token_f1(["", ""], [["x"], ["!"]]) == [0, 1]


def test_score_is_the_means():
    result = score(["a red cat sat", "a dog", "x"], [["a red cat sat"], ["the dog"], ["y"]])
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert result["token_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert result["count"] == 3
    assert 10 / 3 <= result["cider"] < 10


@given(samples)
def test_ranges_and_perfect_predictions(pairs: list):
    predictions = [prediction for prediction, _ in pairs]
    references = [refs for _, refs in pairs]
    matches, f1 = exact_match(predictions, references), token_f1(predictions, references)
    assert all(0 <= value <= 1 for value in f1)
    assert all(f == 1 for m, f in zip(matches, f1, strict=True) if m)
    assert all(-1e-9 <= value <= 10 + 1e-9 for value in cider(predictions, references))
    perfect = score([refs[0] for refs in references], references)
    assert perfect["exact_match"] == perfect["token_f1"] == 1


@given(samples, st.randoms())
def test_samples_may_come_in_any_order(pairs: list, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    first = score([p for p, _ in pairs], [r for _, r in pairs])
    second = score([p for p, _ in shuffled], [r for _, r in shuffled])
    assert first == pytest.approx(second)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no predictions"),
        (["a"], [["a"], ["b"]], "1 predictions for 2 samples"),
        (["a", "b"], [["a"], []], "sample 1 has no list"),
        (["a"], ["a"], "sample 0 has no list"),
    ],
)
def test_wrong_input(predictions: list, references: list, message: str):
    with pytest.raises(DataError, match=message):
        score(predictions, references)


def test_names_and_tones_apart():
    references = [
        ["woman pilot dark skin tone"],
        ["woman pilot dark skin tone"],
        ["kiss man man dark skin tone light skin tone"],
        ["black cat"],
    ]
    predictions = [
        "Woman pilot medium-dark skin tone",
        "man pilot dark skin tone",
        "kiss man man dark skin tone light skin tone",
        "black cat",
    ]
    assert match_parts(predictions, references) == {"name": 0.75, "tone": pytest.approx(2 / 3)}
    assert match_parts(["x"], [["y"]]) == {"name": 0, "tone": None}
