"""Caption metrics on plain strings: exact match, token F1, CIDEr-D, and intervals for their means.

A prediction is compared with one or more references. All metrics see the tokens of `tokenize`, not the PTB tokenizer
of the COCO evaluation tools: figures compare with each other, not with published CIDEr to the last digit.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from vpgtrans.data.openmoji_names import split_tones
from vpgtrans.errors import DataError

_TOKEN = re.compile(r"\w+(?:['-]\w+)*")

NGrams = Counter[tuple[str, ...]]


def tokenize(text: str) -> list[str]:
    """Lower-case words and numbers; hyphens and apostrophes inside a word stay, other punctuation goes."""
    return _TOKEN.findall(text.lower().replace("’", "'"))


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over all samples: `exact_match` and `token_f1` in 0..1, `cider` in 0..10, and their `count`.

    Raises:
        DataError: nothing to score, differing lengths, or a sample without a reference.
    """
    means = {name: fmean(values) for name, values in score_each(predictions, references).items()}
    return {**means, "count": len(predictions)}


def score_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """The metrics of `score` for every sample, for intervals and tables."""
    return {
        "exact_match": exact_match(predictions, references),
        "token_f1": token_f1(predictions, references),
        "cider": cider(predictions, references),
    }


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where the prediction's tokens are those of one of its references, in order; otherwise 0."""
    _check(predictions, references)
    return [
        float(any(tokenize(prediction) == tokenize(reference) for reference in texts))
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F1 of the bags of tokens, the best over a sample's references; 1 if both are empty."""
    _check(predictions, references)
    return [
        max(_f1(tokenize(prediction), tokenize(reference)) for reference in texts)
        for prediction, texts in zip(predictions, references, strict=True)
    ]


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction and not reference:
        return 1.0
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))


def cider(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, n: int = 4, sigma: float = 6.0
) -> list[float]:
    """CIDEr-D (Vedantam et al., 2015) of every sample; the corpus score is their mean.

    For each n-gram length: the cosine of tf-idf vectors, the prediction's clipped to the reference's, times a Gaussian
    penalty of width `sigma` on the difference in length; mean over lengths and references, times 10. Document
    frequencies come from these references, so values belong to their set: with one sample every idf is zero, and a
    caption shorter than n tokens can't reach 10.
    """
    _check(predictions, references)
    grams = [[_ngrams(tokenize(text), n) for text in texts] for texts in references]
    documents: NGrams = Counter(gram for texts in grams for gram in set().union(*texts))
    log_size = math.log(len(references))

    def weigh(counts: NGrams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(n)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (log_size - math.log(max(1, documents[gram])))
        return vectors

    scores = []
    for prediction, texts in zip(predictions, grams, strict=True):
        mine = _ngrams(tokenize(prediction), n)
        total = 0.0
        for text in texts:
            # The reference implementation takes the number of bigrams for a caption's length.
            gap = _bigrams(mine) - _bigrams(text)
            similarity = sum(map(_clipped_cosine, weigh(mine), weigh(text)))
            total += similarity * math.exp(-(gap**2) / (2 * sigma**2))
        scores.append(10 * total / (n * len(texts)))
    return scores


def _ngrams(tokens: list[str], n: int) -> NGrams:
    return Counter(tuple(tokens[i : i + k]) for k in range(1, n + 1) for i in range(len(tokens) - k + 1))


def _bigrams(counts: NGrams) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def _clipped_cosine(prediction: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    norms = math.hypot(*prediction.values()) * math.hypot(*reference.values())
    if norms == 0:
        return 0.0
    return sum(min(w, reference[g]) * reference[g] for g, w in prediction.items() if g in reference) / norms


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions for {len(references)} samples: give one a sample")
    if not predictions:
        raise DataError("no predictions to score: give at least one sample")
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise DataError(f"sample {index} has no list of references: right would be at least one caption")


def match_parts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Exact match of names of emoji, taken apart against each sample's first reference.

    `name`: without skin tones, over all samples. `tone`: the skin tones alone, over the samples that have some; None
    if none has.
    """
    _check(predictions, references)
    pairs = [
        (split_tones(" ".join(tokenize(prediction))), split_tones(" ".join(tokenize(texts[0]))))
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    tones = [float(mine[1] == right[1]) for mine, right in pairs if right[1]]
    return {
        "name": fmean(float(mine[0] == right[0]) for mine, right in pairs),
        "tone": fmean(tones) if tones else None,
    }
