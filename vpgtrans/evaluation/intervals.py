"""How far a mean over samples may be off: percentile bootstrap."""

from collections.abc import Sequence

import numpy as np


def ratio_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """Ends of the 95 % interval of sum(values) / sum(weights), the samples drawn anew with replacement.

    With one sample both ends are its value: the interval says nothing then, and its count says why.

    Args:
        weights: one a value, such as tokens; all 1 if None, so that it is the mean's interval.
    """
    above = np.asarray(values, dtype=np.float64)
    below = np.ones_like(above) if weights is None else np.asarray(weights, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    for draw in range(resamples):  # one at a time: all indices at once would be gigabytes for a large data set
        rows = random.integers(len(above), size=len(above))
        means[draw] = above[rows].sum() / below[rows].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
