"""Score a data set, choose what to keep, write the sidecar. What is scored already is not scored again."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpgtrans.data.config import DataSource
from vpgtrans.data.filter import sidecar
from vpgtrans.data.filter.choose import Rule, choose
from vpgtrans.data.filter.scorers import Batch, Scorer
from vpgtrans.data.filter.sidecar import Scored
from vpgtrans.data.sample import Sample
from vpgtrans.data.sources import Source, open_dataset
from vpgtrans.errors import DataError, Dropped
from vpgtrans.files import appearing, owned
from vpgtrans.progress import bar

_LOGGER = logging.getLogger(__name__)
UNIT = 32
"""Rows whose images are in memory at once. Fixed: a score may depend on what a sample was batched with, a little."""
PART_SECONDS = 30.0
"""A stopped run loses as much at most, and a unit."""
PART_ROWS = 1 << 16


@dataclass(frozen=True)
class Filtered:
    """What a filter did. rows = kept + left_out + unreadable + dropped."""

    sidecar: str
    rows: int
    kept: int
    left_out: int
    unreadable: int
    dropped: int
    scores: list[dict[str, Any]]
    """Of each score: how many rows have one, and its smallest, median and largest; how many rows its rule keeps."""


def filter_data(
    config: DataSource,
    file: Path,
    scorers: Callable[[Source], Sequence[Scorer]],
    *,
    rules: Mapping[str, Rule],
    union: bool = False,
) -> Filtered:
    """Write the sidecar `file` of a data set, or bring it up to date.

    Args:
        scorers: made for the opened source. rules: by the name of a score.

    Raises:
        DataError: the data doesn't open, or a rule is for a score that no scorer gives. OutputError: `file` is
            something else.
    """
    if config.filter is not None or config.limit is not None:
        raise DataError("a filter scores whole data sets: leave out `filter` and `limit`")
    source = open_dataset(config)
    chosen = list(scorers(source))
    names = [name for scorer in chosen for name in scorer.names]
    if unknown := sorted(set(rules) - set(names)):
        raise DataError(f"no score {', '.join(unknown)}; the scores are {', '.join(names)}")
    parts = file.with_name(f"{file.name}.parts")
    earlier = sidecar.read(file, source.rows)
    missing = [scorer for scorer in chosen if earlier is None or not _has(earlier, scorer)]
    if missing:
        with owned(parts):
            scored = _measured(source, missing, parts)
    else:
        assert earlier is not None
        scored = earlier
    if earlier is not None and scored is not earlier:
        scored.scores = earlier.scores | scored.scores
        scored.settings = earlier.settings | scored.settings
    # Rows are judged among those that can be learnt.
    scores = {name: np.where(scored.readable, scored.scores[name], np.nan) for name in names}
    keep = choose(scores, rules, union=union) & scored.readable
    sidecar.write(file, source.rows, scored, keep)
    shutil.rmtree(parts, ignore_errors=True)
    return _summary(file, scored, scores, rules, keep)


def _has(earlier: Scored, scorer: Scorer) -> bool:
    return all(name in earlier.scores and earlier.settings.get(name) == scorer.settings for name in scorer.names)


# --- measuring ----------------------------------------------------------------------------------


def _measured(source: Source, scorers: Sequence[Scorer], parts: Path) -> Scored:
    """Measure all rows, from where an earlier call stopped, and make the scores of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    task = {
        "fingerprint": source.fingerprint,
        "scorers": [[sorted(scorer.names), scorer.settings] for scorer in scorers],
    }
    state = parts / "task.json"
    text = json.dumps(task, sort_keys=True)
    if not state.is_file() or state.read_text() != text:
        for old in parts.iterdir():
            old.unlink()
        with appearing(state) as temporary:
            temporary.write_text(text)
    done = sorted(parts.glob("*.parquet"))
    start = int(done[-1].stem) if done else 0
    with bar() as progress:
        shown = progress.add_task(f"{source.name}: scores", total=len(source), completed=start, note="")
        while start < len(source):
            columns: list[dict[str, Any]] = []
            begun, first = time.monotonic(), start
            while start < len(source) and start - first < PART_ROWS:
                rows = range(start, min(len(source), start + UNIT))
                columns.append(_unit(source, scorers, rows))
                start = rows.stop
                progress.advance(shown, len(rows))
                if time.monotonic() - begun > PART_SECONDS:
                    break
            part = parts / f"{start:012d}.parquet"  # named by where the next one begins
            with appearing(part) as temporary:
                pq.write_table(pa.concat_tables([pa.table(column) for column in columns]), temporary)
            done.append(part)
    table = pa.concat_tables([pq.read_table(part) for part in done])
    problems = table["problem"].combine_chunks()
    measured = {name: table[name].to_numpy() for name in table.column_names if name not in ("id", "problem")}
    scored = Scored(table["id"].combine_chunks(), problems, {}, {})
    for scorer in scorers:
        scored.scores |= scorer.scores(measured, scored.readable)
        scored.settings |= dict.fromkeys(scorer.names, scorer.settings)
    return scored


def _unit(source: Source, scorers: Sequence[Scorer], rows: range) -> dict[str, Any]:
    """Columns of a few rows: id, problem, and what the scorers measured."""
    import pyarrow as pa

    looks = any(scorer.looks for scorer in scorers)
    ids: list[str] = []
    problems: list[str | None] = []
    taken: list[int] = []
    samples: list[Sample] = []
    images: list[list[Image.Image]] = []
    for row in rows:
        problem = None
        try:
            sample = source.sample(row)
            opened = source.open(sample) if looks else []
        except DataError as error:
            problem = f"dropped: {error}" if isinstance(error, Dropped) else f"unreadable: {error}"
            if not isinstance(error, Dropped):
                _LOGGER.warning("%s", error)
            ids.append(source.id(row))
        else:
            ids.append(sample.id)
            taken.append(row)
            samples.append(sample)
            images.append(opened)
        problems.append(problem)
    columns: dict[str, Any] = {
        "id": pa.array(ids, pa.string()),
        "problem": pa.array(problems, pa.string()),
    }
    places = np.array(taken, dtype=np.int64) - rows.start
    for scorer in scorers:
        for name, values in scorer.measure(Batch(taken, samples, images)).items():
            # what a row that is no sample gets is never looked at
            column = np.full(len(rows), np.nan if values.dtype.kind == "f" else 0, dtype=values.dtype)
            column[places] = values
            columns[name] = pa.array(column)
    return columns


def _summary(
    file: Path, scored: Scored, scores: Mapping[str, np.ndarray], rules: Mapping[str, Rule], keep: np.ndarray
) -> Filtered:
    table = []
    for name, values in scores.items():
        there = values[~np.isnan(values)]
        quantiles = np.quantile(there, [0, 0.5, 1]).tolist() if len(there) else [None] * 3
        rule = rules.get(name, Rule())
        table.append(
            {"score": name, "rows": len(there)}
            | dict(zip(("min", "median", "max"), quantiles, strict=True))
            | {"keeps": int(rule.keep(values).sum()) if rule.says_something else None}
        )
    readable = int(scored.readable.sum())
    dropped = sum(str(problem).startswith("dropped: ") for problem in scored.problems.drop_null().to_pylist())
    return Filtered(
        sidecar=str(file),
        rows=len(keep),
        kept=int(keep.sum()),
        left_out=readable - int(keep.sum()),
        unreadable=len(keep) - readable - dropped,
        dropped=dropped,
        scores=table,
    )
