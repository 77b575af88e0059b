"""Score a data set, choose what to keep, write the sidecar. What is scored already is not scored again."""

import contextlib
import hashlib
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
_TASK = "task.json"


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
    done: list[Path] = []
    with owned(parts):
        try:
            scored = sidecar.read(file, source)
            while missing := [scorer for scorer in chosen if scored is None or not _has(scored, scorer)]:
                group, folder = _group(source, missing, parts)
                scored = _merged(scored, group, _measured(source, group, folder))
                done.append(folder)
            assert scored is not None
            # Rows are judged among those that can be learnt.
            scores = {name: np.where(scored.readable, scored.scores[name], np.nan) for name in names}
            keep = choose(scores, rules, union=union) & scored.readable
            sidecar.write(file, source, scored, keep)
            for folder in done:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            with contextlib.suppress(OSError):  # something is left in it
                parts.rmdir()
    return _summary(file, scored, scores, rules, keep)


def _has(earlier: Scored, scorer: Scorer) -> bool:
    return all(
        name in earlier.scores and earlier.settings.get(name) == [scorer.settings, scorer.relative]
        for name in scorer.names
    )


# --- measuring ----------------------------------------------------------------------------------


def _task(source: Source, scorers: Sequence[Scorer]) -> dict[str, Any]:
    """What measurements depend on."""
    return {"fingerprint": source.fingerprint, "scorers": sorted(map(_named, scorers), key=lambda one: one[0])}


def _named(scorer: Scorer) -> list[Any]:
    return [sorted(scorer.names), scorer.settings]


def _folder(parts: Path, task: dict[str, Any]) -> Path:
    return parts / hashlib.sha256(json.dumps(task, sort_keys=True).encode()).hexdigest()[:32]


def _group(source: Source, scorers: Sequence[Scorer], parts: Path) -> tuple[Sequence[Scorer], Path]:
    """Scorers to measure together and the folder of their parts: those that an earlier call went furthest with, so
    that nothing is lost if others are asked for besides; else all."""
    found: list[tuple[int, Sequence[Scorer], Path]] = []
    for state in sorted(parts.glob(f"*/{_TASK}")):
        try:
            known = json.loads(state.read_text())["scorers"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # none of ours
        named = [scorer for scorer in scorers if _named(scorer) in known]
        if named and state.parent == _folder(parts, _task(source, named)):
            found.append((_measured_rows(state.parent), named, state.parent))
    _, group, folder = max(found, default=(0, scorers, _folder(parts, _task(source, scorers))), key=lambda one: one[0])
    return group, folder


def _parts(folder: Path) -> list[Path]:
    """Named by the row that the next one begins with."""
    return sorted(part for part in folder.glob("*.parquet") if part.stem.isdecimal())


def _measured_rows(folder: Path) -> int:
    done = _parts(folder)
    return int(done[-1].stem) if done else 0


def _measured(source: Source, scorers: Sequence[Scorer], folder: Path) -> Any:
    """Measure all rows, from where an earlier call stopped: an Arrow table of id, problem and measurements."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    with appearing(folder / _TASK) as temporary:
        temporary.write_text(json.dumps(_task(source, scorers)))
    start = _measured_rows(folder)
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
            with appearing(folder / f"{start:012d}.parquet") as temporary:
                pq.write_table(pa.concat_tables([pa.table(column) for column in columns]), temporary)
    return pa.concat_tables([pq.read_table(part) for part in _parts(folder)])


def _merged(earlier: Scored | None, scorers: Sequence[Scorer], table: Any) -> Scored:
    """Measurements as scores, beside the earlier ones. A row is readable if it was so for every scorer."""
    import pyarrow.compute as pc

    problems = table["problem"].combine_chunks()
    if earlier is not None:
        problems = pc.coalesce(earlier.problems, problems)
    scored = Scored(table["id"].combine_chunks(), problems, {}, {})
    if earlier is not None:
        same = np.array_equal(scored.readable, earlier.readable)
        for name, (settings, relative) in earlier.settings.items():
            if same or not relative:
                scored.scores[name] = np.where(scored.readable, earlier.scores[name], np.nan)
                scored.settings[name] = [settings, relative]
    measured = {name: table[name].to_numpy() for name in table.column_names if name not in ("id", "problem")}
    for scorer in scorers:
        scored.scores |= scorer.scores(measured, scored.readable)
        scored.settings |= {name: [scorer.settings, scorer.relative] for name in scorer.names}
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
