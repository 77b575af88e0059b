"""From the names of scorers, as they stand on a command line, to scorers and rules."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from vpgtrans.data.filter.choose import Better, Rule
from vpgtrans.data.filter.models import VLM_SCORES, Clip, VlmLoss
from vpgtrans.data.filter.scorers import Column, Duplicate, Length, Scorer
from vpgtrans.data.sources import Source
from vpgtrans.errors import DataError
from vpgtrans.explain import did_you_mean
from vpgtrans.vlm import VLM

_DUPLICATES = {"duplicate": "pair", "duplicate-text": "text", "duplicate-image": "image"}
_NAMES = (*VLM_SCORES, "clip", "length", *_DUPLICATES)


def plan(
    *,
    scorers: Sequence[str],
    open_vlm: Callable[[str], VLM],
    device: torch.device,
    keep_fraction: float | None = None,
    thresholds: Sequence[str] = (),
    words: str | None = None,
    vlm: str | None = None,
    clip: str | None = None,
    others: int = 8,
    seed: int = 0,
) -> tuple[Callable[[Source], list[Scorer]], dict[str, Rule]]:
    """What makes the scorers of a source, and a rule for each score that has one.

    Args:
        open_vlm: what `vlm` names, when it is first needed. device: of `clip`.

    Raises:
        DataError: a scorer that there is not, or one without what it needs.
    """
    names = list(dict.fromkeys(scorers))
    columns = {name: _column(name) for name in names if name.startswith("column:")}
    for name in names:
        if name not in _NAMES and name not in columns:
            raise DataError(f"no scorer {name!r}{did_you_mean(name, _NAMES)}; the scorers are {', '.join(_NAMES)}, "
                            "column:FILE.parquet:COLUMN")  # fmt: skip
    scores = [Column.named(file, column) for file, column, _ in columns.values()]
    if twice := next((score for score in scores if scores.count(score) > 1), None):
        raise DataError(f"{twice}: two files of one name; right would be names that differ")
    of_vlm = [name for name in names if name in VLM_SCORES]
    for given, option, wanted in (
        (vlm, "--vlm", of_vlm),
        (clip, "--clip", [n for n in names if n == "clip"]),
        (words, "--words", [n for n in names if n == "length"]),
    ):
        if wanted and given is None:
            raise DataError(f"scorer {wanted[0]} needs {option}")
        if given is not None and not wanted:
            raise DataError(f"{option} is given, but no scorer that takes it")
    if keep_fraction is not None and all(name == "length" or name in _DUPLICATES for name in names):
        raise DataError(f"--keep-fraction is given, but no scorer that takes it: {', '.join(names)} keep by a rule of "
                        "their own")  # fmt: skip

    def build(source: Source) -> list[Scorer]:
        built: list[Scorer] = []
        if of_vlm and vlm is not None:
            built.append(VlmLoss(source, vlm, of_vlm, open_vlm=open_vlm, others=others, seed=seed))
        for name in names:
            if name == "clip" and clip is not None:
                built.append(Clip(clip, device=device))
            elif name == "length":
                built.append(Length())
            elif name in _DUPLICATES:
                built.append(Duplicate(_DUPLICATES[name]))
            elif name in columns:
                file, column, better = columns[name]
                built.append(Column(source, file, column, better=better))
        return built

    return build, _rules(names, columns, keep_fraction, thresholds, words)


def _column(name: str) -> tuple[Path, str, Better]:
    """`column:FILE:COLUMN[:low]`; a file's name may have colons, a column's may not."""
    rest = name.removeprefix("column:")
    better: Better = "high"
    if rest.endswith((":low", ":high")):
        rest, _, end = rest.rpartition(":")
        better = "low" if end == "low" else "high"
    file, _, column = rest.rpartition(":")
    if not file or not column:
        raise DataError(f"{name}: right would be column:FILE.parquet:COLUMN")
    return Path(file).expanduser(), column, better


def _rules(
    names: Sequence[str],
    columns: dict[str, tuple[Path, str, Better]],
    fraction: float | None,
    thresholds: Sequence[str],
    words: str | None,
) -> dict[str, Rule]:
    ends: dict[str, Better] = {**VLM_SCORES, "clip": "high"}
    ends |= {Column.named(file, column): better for file, column, better in columns.values()}
    named = {name: Column.named(*columns[name][:2]) if name in columns else name for name in names}
    limits = _limits(thresholds, [named[name] for name in names if named[name] in ends], named)
    rules: dict[str, Rule] = {}
    for name in (named[name] for name in names):
        if name in _DUPLICATES:
            rules[name] = Rule("low", maximum=0, always=True)
        elif name == "length":
            low, high = _words(words or "")
            rules[name] = Rule(minimum=low, maximum=high, always=True)
        elif ends[name] == "high":
            rules[name] = Rule("high", fraction=fraction, minimum=limits.get(name))
        else:
            rules[name] = Rule("low", fraction=fraction, maximum=limits.get(name))
    return rules


def _limits(thresholds: Sequence[str], names: Sequence[str], named: dict[str, str]) -> dict[str, float]:
    """`[SCORER=]T` each; without a name where there is one scorer."""
    found: dict[str, float] = {}
    for text in thresholds:
        name, equals, value = text.rpartition("=")
        name = named.get(name, name)
        if not equals and not names:
            raise DataError(f"--threshold {text}: none of the scorers gives a score to choose by")
        if not equals and len(names) != 1:
            raise DataError(
                f"--threshold {text}: of which score? Right would be SCORER={text}, with {', '.join(names)}"
            )
        if equals and name not in names:
            raise DataError(
                f"--threshold {text}: no score {name!r} to choose by; there is {', '.join(names) or 'none'}"
            )
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if math.isnan(limit):
            raise DataError(f"--threshold {text}: {value!r} is no number")
        found[name if equals else names[0]] = limit
    return found


def _words(text: str) -> tuple[float | None, float | None]:
    """`3:60`, `3:` or `:60`."""
    low, colon, high = text.partition(":")
    if not colon or not (low or high) or not all(end.isdigit() or not end for end in (low, high)):
        raise DataError(f"--words {text}: right would be MIN:MAX, such as 3:60 or 3:")
    if low and high and int(low) > int(high):
        raise DataError(f"--words {text}: nothing has at least {low} and at most {high} words")
    return (float(low) if low else None), (float(high) if high else None)
