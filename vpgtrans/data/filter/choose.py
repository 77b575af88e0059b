"""From scores to rows that are kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Better = Literal["high", "low"]


@dataclass(frozen=True)
class Rule:
    """What one scorer keeps. A row that it can't judge (NaN) it neither keeps nor leaves out.

    Attributes:
        fraction: of the judged rows, the best ones; of equals the earlier ones. minimum, maximum: of the score.
        always: a rule that a row must obey also where a union of scorers is asked for.
    """

    better: Better = "high"
    fraction: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    always: bool = False

    @property
    def says_something(self) -> bool:
        return not (self.fraction is None and self.minimum is None and self.maximum is None)

    def keep(self, scores: np.ndarray) -> np.ndarray:
        """Scores [n], NaN where there is none -> bool [n], false where there is none."""
        kept = ~np.isnan(scores)
        if self.fraction is not None:
            judged = np.flatnonzero(kept)
            values = scores[judged] if self.better == "low" else -scores[judged]
            best = judged[np.argsort(values, kind="stable")[: round(self.fraction * len(judged))]]
            kept = np.zeros(len(scores), dtype=bool)
            kept[best] = True
        if self.minimum is not None:
            kept &= scores >= self.minimum
        if self.maximum is not None:
            kept &= scores <= self.maximum
        return kept


def choose(scores: Mapping[str, np.ndarray], rules: Mapping[str, Rule], *, union: bool) -> np.ndarray:
    """The rows that all rules keep, bool [n]; with `union` those that any of them keeps, and that the `always` ones do.

    A rule has no say about rows that it can't judge; a row that no rule judges is kept.
    """
    chosen = {name: rule for name, rule in rules.items() if rule.says_something}
    musts = [name for name, rule in chosen.items() if rule.always or not union]
    anys = [name for name in chosen if name not in musts]
    kept = np.ones(len(next(iter(scores.values()))), dtype=bool)
    for name in musts:
        kept &= chosen[name].keep(scores[name]) | np.isnan(scores[name])
    if anys:
        wanted = _any([chosen[name].keep(scores[name]) for name in anys])
        judged = _any([~np.isnan(scores[name]) for name in anys])
        kept &= wanted | ~judged
    return kept


def _any(masks: Sequence[np.ndarray]) -> np.ndarray:
    return np.logical_or.reduce(masks)
