"""The page of a comparison: the same target, data and budget from several starts, and what each saved."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vpgtrans.report import format as fmt
from vpgtrans.report.curves import SCRATCH, Arm, compare_arms, scratch_best
from vpgtrans.report.html import Cell, Head, Table, sentence, write_page
from vpgtrans.report.plots import compare_chart
from vpgtrans.report.read import read_run


def write_compare_report(run: Path) -> Path:
    """Write `run/report.html` for a comparison's directory and return its path.

    Raises:
        DataError: no directory, no summary.json, or one that isn't a comparison's.
        OutputError: the page can't be written.
    """
    files = read_run(run)
    arms = compare_arms(files.summary)
    headline, *rest = findings(arms)
    return write_page(
        run / "report.html",
        "compare.html.jinja",
        kind="A comparison by vpgtrans",
        title=f"{sentence([arm.name for arm in arms])} compared · vpgtrans",
        headline=headline,
        lead=rest,
        measured="",
        key_figures=_key_figures(files.summary, arms),
        version=(files.environment or {}).get("versions", {}).get("vpgtrans", ""),
        chart=compare_chart(
            arms, prefix="arms", title="Validation loss by samples seen", description=" ".join(findings(arms))
        ),
        points=_points(arms),
        arms=_table(arms),
        definitions=[(str(arm), str(text)) for arm, text in (files.summary.get("definitions") or {}).items()],
        terms=[
            (key.replace("_", " "), fmt.plain(value))
            for top in ("budget", "seeds")
            if files.summary.get(top) is not None
            for key, value in fmt.flatten({top: files.summary[top]})
        ],
        recipe=files.recipe,
        environment=[(key, fmt.plain(value)) for key, value in fmt.flatten(files.environment or {})],
        lineage=[(key.replace("_", " "), fmt.plain(value)) for key, value in fmt.flatten(files.lineage or {})],
    )


def markdown_table(summary: dict[str, Any]) -> str:
    """The comparison's table for a README, and below it what each arm is, where the summary says so.

    Raises:
        DataError: the summary isn't a comparison's.
    """
    table = _table(compare_arms(summary))
    cells = [[head.text for head in table.heads], *([_flat(cell) for cell in row] for row in table.rows)]
    lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("--:" if head.numeric else ":--" for head in table.heads) + "|")
    definitions = [f"- **{arm}**: {text}" for arm, text in (summary.get("definitions") or {}).items()]
    return "\n".join([*lines, *(["", *definitions] if definitions else [])]) + "\n"


def findings(arms: Sequence[Arm]) -> list[str]:
    """What the comparison says, in sentences; the first is the headline. Losing is said as plainly as winning."""
    goal = scratch_best(arms)
    others = [arm for arm in arms if arm.name != SCRATCH]
    # The subject is `transfer` where it takes part, else the first arm beside scratch.
    subject = next((arm for arm in others if arm.name == "transfer"), others[0] if others else None)
    if goal is None or subject is None:
        best = min(arms, key=lambda arm: median(arm.best))
        return [f"{best.name} ends with the lowest validation loss, {fmt.decimal(median(best.best))}."]
    gain = subject.speedup.get("median") if subject.speedup else None
    seeds, saved = len(subject.best), fmt.ratio(gain)
    if not fmt.is_number(gain):
        text = f"From the same data, {subject.name} never reached scratch's best validation loss of {fmt.decimal(goal)}"
    elif gain >= 1:
        text = f"From the same data, {subject.name} was as good as scratch at its best after {saved} fewer samples"
    else:
        text = (
            f"From the same data, {subject.name} needed more samples than scratch for its best: a speed-up of {saved}"
        )
    lines = [f"{text} ({'median of ' if seeds > 1 else ''}{seeds} seed{'s' if seeds > 1 else ''})."]
    ranked = sorted(arms, key=lambda arm: median(arm.best))
    order = [f"{arm.name} {fmt.decimal(median(arm.best))}" for arm in ranked]
    lines.append(f"Best validation loss, median over seeds, lowest first: {sentence(order)}.")
    if ranked[0] is not subject:
        lines.append(f"With the whole budget spent, {ranked[0].name} ended below {subject.name}.")
    return lines


def _key_figures(summary: dict[str, Any], arms: Sequence[Arm]) -> list[tuple[str, str]]:
    rows = [
        (f"{arm.name} over scratch, in samples", fmt.ratio(arm.speedup.get("median")) if arm.speedup else "never")
        for arm in arms
        if arm.name != SCRATCH and scratch_best(arms) is not None
    ]
    return [*rows, ("seeds", fmt.count(max(len(arm.best) for arm in arms)))]


def _median_cell(values: Sequence[float], show: Callable[[Any], str]) -> Cell:
    """`3.689` and below it `[3.61 – 3.72]`; a median among values that never came is `never`."""
    if not values:
        return Cell(fmt.NOTHING)
    finite = [value for value in values if math.isfinite(value)]
    middle = median(values)
    cell = show(middle) if math.isfinite(middle) else "never"
    if len(finite) < len(values):
        below = f"{len(finite)} of {len(values)} seeds" if len(values) > 1 else ""
        return Cell(cell, below=f"reached by {below}" if below and finite else "")
    return Cell(cell, below=fmt.spread(min(values), max(values), show))


def _table(arms: Sequence[Arm]) -> Table:
    table = Table(
        "Median over seeds, [smallest – largest]",
        [
            Head("Arm", numeric=False),
            Head("Best validation loss"),
            Head("Speed-up in samples"),
            Head("Samples to scratch's best"),
            Head("Time"),
        ],
        cards=True,
    )
    lowest = min(median(arm.best) for arm in arms)
    for arm in arms:
        gain = arm.speedup or {}
        if arm.name == SCRATCH:
            speed = Cell("1×")
        elif not fmt.is_number(gain.get("median")):
            speed = Cell("never")
        else:
            speed = Cell(fmt.ratio(gain["median"]), below=fmt.spread(gain.get("min"), gain.get("max"), fmt.ratio))
        loss = _median_cell(arm.best, fmt.decimal)
        lowest_here = median(arm.best) == lowest
        table.add(
            arm.name,
            Cell(loss.text, below=loss.below, mark="lowest" if lowest_here else ""),
            speed,
            _median_cell(arm.reached, fmt.count),
            _median_cell(arm.seconds, fmt.duration),
        )
    return table


def _points(arms: Sequence[Arm]) -> Table:
    table = Table(
        "Median validation loss over seeds [smallest – largest] by samples seen",
        [Head("Samples", numeric=False), *(Head(arm.name) for arm in arms)],
    )
    by_samples: dict[float, dict[str, Cell]] = {}
    for arm in arms:
        for samples, middle, low, high in zip(*(part.tolist() for part in arm.band), strict=True):
            spread = fmt.spread(low, high, fmt.decimal)
            by_samples.setdefault(samples, {})[arm.name] = Cell(fmt.decimal(middle), below=spread)
    for samples in sorted(by_samples):
        table.add(fmt.count(samples), *(by_samples[samples].get(arm.name, Cell(fmt.NOTHING)) for arm in arms))
    return table


def _flat(cell: Cell) -> str:
    return f"{cell.text} {cell.below}" if cell.below else cell.text
