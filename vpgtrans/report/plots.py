"""Charts: a run's curves and a comparison's, as themed inline SVG and as a PNG for a README.

Text stays text in the SVG and is set in the page's font. Each chart is drawn once wide and once narrow with the same
text size, since one drawing scaled to a phone has unreadable labels.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vpgtrans.errors import DataError, OutputError
from vpgtrans.report.curves import Arm, RunCurves, compare_arms, scratch_best, smooth, thin
from vpgtrans.report.format import count, decimal, learning_rate, ratio
from vpgtrans.report.style import LIGHT, arm_styles, inline_svg

Width = Literal["wide", "narrow"]

_PIXELS: dict[str, int] = {"wide": 960, "narrow": 330}
_RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vpgtrans",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 12.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "text.color": LIGHT["ink"],
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
}


def run_chart(curves: RunCurves, *, prefix: str, title: str, description: str) -> Markup:
    """Losses and learning rate of one run by samples seen, wide and narrow, as HTML."""
    return _both(lambda width: _run_figure(curves, width=width), prefix=prefix, title=title, description=description)


def compare_chart(arms: Sequence[Arm], *, prefix: str, title: str, description: str) -> Markup:
    """Validation loss by samples seen of each arm, wide and narrow, as HTML."""
    return _both(lambda width: _compare_figure(arms, width=width), prefix=prefix, title=title, description=description)


def compare_plot(summary: dict[str, Any], png: Path) -> Path:
    """Draw a comparison's summary as a PNG 1,600 pixels wide and return its path.

    Raises:
        DataError: the summary isn't a comparison's.
        OutputError: the file can't be written.
    """
    arms = compare_arms(summary)
    with mpl.rc_context(_RC):
        figure = _compare_figure(arms, width="wide")
        FigureCanvasAgg(figure)
        try:
            png.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(png, dpi=72 * 1600 / _PIXELS["wide"], facecolor=LIGHT["page"], metadata={"Software": None})
        except OSError as error:
            raise OutputError(f"{png}: can't write the plot ({error})") from error
    return png


def _both(draw: Any, *, prefix: str, title: str, description: str) -> Markup:
    parts = []
    for width in ("wide", "narrow"):
        with mpl.rc_context(_RC):
            figure = draw(width)
            FigureCanvasSVG(figure)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        svg = inline_svg(
            stream.getvalue(),
            prefix=f"{prefix}-{width}",
            title=str(escape(title)),
            description=str(escape(description)),
        )
        parts.append(f'<div class="chart {width}">{svg}</div>')
    return Markup("\n".join(parts))


def _figure(width: Width, height: float) -> Figure:
    return Figure(figsize=(_PIXELS[width] / 72, height / 72))  # an SVG point becomes one CSS pixel


# --- one run ------------------------------------------------------------------------------------


def _run_figure(curves: RunCurves, *, width: Width) -> Figure:
    wide = width == "wide"
    figure = _figure(width, 460 if wide else 430)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, right = (64, 100) if wide else (44, 12)
    figure.subplots_adjust(
        left=left / _PIXELS[width], right=1 - right / _PIXELS[width], top=0.91, bottom=0.13, hspace=0.2
    )
    end = max([stage[2] for stage in curves.stages] + [1.0])

    if curves.train:
        window = max(1, len(curves.train) // 25)
        if window > 2:
            losses.plot(*_xy(thin(curves.train)), color=LIGHT["series-2"], linewidth=0.7, alpha=0.35)
        line = thin(smooth(curves.train, window=window))
        losses.plot(*_xy(line), color=LIGHT["series-2"], linewidth=1.6, linestyle=(0, (2, 1.2)))
    if curves.validation:
        losses.plot(*_xy(curves.validation), color=LIGHT["accent"], linewidth=2.2, marker="o", markersize=3.6)
    _log_y(losses, [value for _, value in curves.validation + curves.train])
    losses.set_title("Loss (nats a token)", loc="left", color=LIGHT["muted"], fontsize=12, pad=22)
    best = curves.best
    if best:
        losses.plot(
            *best,
            marker="o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=LIGHT["accent"],
            markeredgewidth=1.6,
            clip_on=False,
        )
        losses.annotate(
            f"best {decimal(best[1])}",
            best,
            xytext=(0, 10),
            textcoords="offset points",
            ha="right" if best[0] > 0.85 * end else "center",
            va="bottom",
            color=LIGHT["accent"],
            fontweight="bold",
        )
    _direct_labels(
        losses,
        [
            (text, points[-1][1], role)
            for text, points, role in (
                ("validation", curves.validation, "accent"),
                ("training", smooth(curves.train, window=max(1, len(curves.train) // 25)), "series-2"),
            )
            if points
        ],
        inside=not wide,
    )

    styles = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
    for index, (part, points) in enumerate(curves.rates.items()):
        rates.plot(*_xy(thin(points)), color=LIGHT["ink"], linewidth=1.5, linestyle=styles[index % len(styles)])
        if part and wide:
            rates.annotate(
                part, points[-1], xytext=(8, 0), textcoords="offset points", va="center", annotation_clip=False
            )
    values = [value for points in curves.rates.values() for _, value in points if value > 0]
    if values:
        rates.set_yscale("log")
        low, high = max(min(values), max(values) / 300) / 1.6, max(values) * 1.6  # a cosine's end says nothing
        rates.set_ylim(low, high)
        rates.yaxis.set_major_locator(FixedLocator(_steps(low, high, (1.0,)) or [max(values)]))
        rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: learning_rate(value)))
        rates.yaxis.set_minor_locator(NullLocator())
    rates.set_title("Learning rate", loc="left", color=LIGHT["muted"], fontsize=12, pad=6)
    rates.set_xlabel("samples seen")
    rates.set_xlim(0, end)
    rates.xaxis.set_major_locator(mpl.ticker.MaxNLocator(8 if wide else 4, steps=[1, 2, 2.5, 5, 10]))
    rates.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    for axes in (losses, rates):
        axes.grid(axis="y")
        axes.tick_params(length=0, pad=5)
        for _, start, _ in curves.stages[1:]:
            axes.axvline(start, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)))
    for name, start, stop in curves.stages:
        losses.annotate(
            name,
            (start, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5 if start else 0, 5),
            textcoords="offset points",
            fontweight="bold",
            annotation_clip=False,
        ) if stop > start else None
    return figure


# --- a comparison -------------------------------------------------------------------------------


def _compare_figure(arms: Sequence[Arm], *, width: Width) -> Figure:
    wide = width == "wide"
    figure = _figure(width, 540 if wide else 430)
    axes = figure.subplots()
    longest = max(len(arm.name) for arm in arms) + (6 if wide else 0)
    left, right = (58, 24 + 9 * longest) if wide else (40, min(10 + 8.5 * longest, 130))
    figure.subplots_adjust(left=left / _PIXELS[width], right=1 - right / _PIXELS[width], top=0.92, bottom=0.12)
    styles = arm_styles([arm.name for arm in arms])
    bands = {arm.name: arm.band for arm in arms}
    if not any((grid > 0).any() for grid, *_ in bands.values()):
        raise DataError("no arm has a validation loss after its first sample: there is nothing to draw")
    _samples_axis(axes, np.concatenate([grid for grid, *_ in bands.values()]), ticks=8 if wide else 5)
    _log_y(axes, np.concatenate([np.concatenate(band[1:]) for band in bands.values()]).tolist())
    for arm in arms:
        grid, middle, low, high = bands[arm.name]
        style = styles[arm.name]
        colour = LIGHT[style["role"]]
        if len(arm.curves) > 1:
            axes.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(grid, middle, color=colour, linewidth=2.4, linestyle=style["dash"])
    _crossings(axes, arms, styles, wide=wide)
    _direct_labels(
        axes,
        [
            (
                f"{arm.name}  {decimal(bands[arm.name][1][-1], 2)}" if wide else arm.name,
                bands[arm.name][1][-1],
                styles[arm.name]["role"],
            )
            for arm in arms
        ],
    )
    axes.set_title(
        "Validation loss (nats a token)" + ("; line: median, band: range over seeds" if wide else ""),
        loc="left",
        color=LIGHT["muted"],
        fontsize=12.5 if wide else 12,
        pad=12,
    )
    axes.set_xlabel("samples seen, warm-up included")
    axes.grid(axis="y")
    axes.tick_params(length=0, pad=6)
    return figure


def _crossings(axes: Axes, arms: Sequence[Arm], styles: dict[str, dict], *, wide: bool) -> None:
    """Scratch's best as a dashed line; on it, where each arm first got there, and below, what that says."""
    goal = scratch_best(arms)
    if goal is None:
        return
    axes.axhline(goal, color=LIGHT["ink"], linewidth=1, linestyle=(0, (5, 4)))
    axes.annotate(
        f"scratch's best {decimal(goal, 2)}" if wide else decimal(goal, 2),
        (0, goal),
        xycoords=("axes fraction", "data"),
        xytext=(5, -5),
        textcoords="offset points",
        va="top",  # left of the first crossing and below the line there is no curve
        bbox={"facecolor": LIGHT["page"], "edgecolor": "none", "pad": 1, "alpha": 0.8},
        zorder=4,
    )
    reaching = sorted((arm for arm in arms if math.isfinite(arm.reached_median)), key=lambda arm: arm.reached_median)
    row = 0.058 if wide else 0.07
    low, high = axes.get_ylim()
    # A strip below the curves, one row an arm: the labels can meet neither each other nor a curve. The line to a label
    # ends at its row, and the label covers what crosses it.
    strip = (len(reaching) + 0.6) * row
    axes.set_ylim(low * (low / high) ** (strip / (1 - strip)), high)
    for index, arm in enumerate(reaching):
        colour = LIGHT[styles[arm.name]["role"]]
        samples, height = arm.reached_median, (len(reaching) - index - 0.4) * row
        position = axes.transAxes.inverted().transform(axes.transData.transform((samples, goal)))[0]
        foot = axes.transData.inverted().transform(axes.transAxes.transform((0, height - row / 3)))[1]
        axes.plot([samples] * 2, [goal, foot], color=colour, linewidth=1.2, linestyle=(0, (1.5, 2)))
        axes.plot(samples, goal, marker=styles[arm.name]["marker"], color=colour, markersize=9, clip_on=False, zorder=5)
        gain = arm.speedup.get("median") if arm.speedup else None
        text = f"{count(samples)}" if wide else _short(samples)
        text = f"{arm.name} at {text}" + (f": {ratio(gain)} sooner" if gain and gain > 1 and wide else "")
        axes.annotate(
            text,
            (samples, height),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if position > 0.5 else 6, 0),
            textcoords="offset points",
            ha="right" if position > 0.5 else "left",
            va="center",
            color=colour,
            bbox={"facecolor": LIGHT["page"], "edgecolor": "none", "pad": 1.5},
            zorder=4,
        )


# --- shared -------------------------------------------------------------------------------------


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _steps(low: float, high: float, mantissas: Sequence[float]) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def _log_y(axes: Axes, values: Sequence[float]) -> None:
    """A log axis around `values` with few round ticks; linear where a value isn't positive."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0:
        return
    low, high = min(finite), max(finite)
    pad = max(high / low, 1.05) ** 0.06
    axes.set_yscale("log")
    axes.set_ylim(low / pad, high * pad)
    choices = [(1.0, 10.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0), np.arange(1.0, 10.0, 0.5)]
    choices += [np.arange(1.0, 10.0, 0.2), np.arange(1.0, 10.0, 0.1), np.arange(1.0, 10.0, 0.02)]
    ticks = next((t for c in choices if len(t := _steps(low / pad, high * pad, list(c))) >= 4), [low, high])
    axes.yaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 9)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _samples_axis(axes: Axes, samples: np.ndarray, *, ticks: int) -> None:
    """Zero, then a log scale from the first validation on, where the range is worth one."""
    first, last = float(samples[samples > 0].min()), float(samples.max())
    if last < 10 * first:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.set_xlim(min(0.0, float(samples.min())), last)
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(ticks))
        return
    axes.set_xscale("symlog", linthresh=first, linscale=0.35)
    axes.set_xlim(0 if samples.min() <= 0 else first, last)
    marks = _steps(first, last, (1.0, 2.0, 5.0))
    if len(marks) >= ticks:
        marks = marks[:: math.ceil(len(marks) / (ticks - 1))]
    axes.xaxis.set_major_locator(FixedLocator([0.0, *marks]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))  # a new scale resets it
    axes.xaxis.set_minor_locator(NullLocator())


def _direct_labels(axes: Axes, labels: Sequence[tuple[str, float, str]], *, inside: bool = False) -> None:
    """Names at the curves' right ends (or, `inside`, at the top right), moved apart where they would overlap."""
    if inside:
        for index, (text, _, role) in enumerate(labels):
            axes.text(
                0.99, 0.95 - 0.08 * index, text, transform=axes.transAxes, ha="right", va="top", color=LIGHT[role]
            )
        return
    height = axes.bbox.height / axes.figure.dpi * 72
    gap = 17 / height
    places = [axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1] for _, y, _ in labels]
    for (text, _, role), place in zip(labels, spread_apart(places, gap=gap), strict=True):
        axes.annotate(
            text,
            (1, place),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=LIGHT[role],
            fontweight="bold",
        )


def spread_apart(places: Sequence[float], *, gap: float) -> list[float]:
    """The nearest places (least squares) in the same order that are at least `gap` apart.

    Less `i * gap` for the i-th lowest, the places sought must not fall: isotonic regression, by pooling neighbours.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([places[index] - rank * gap])
        while len(pools) > 1 and float(np.mean(pools[-2])) > float(np.mean(pools[-1])):
            pools[-2:] = [pools[-2] + pools[-1]]
    levels = [float(np.mean(pool)) for pool in pools for _ in pool]
    result = [0.0] * len(places)
    for rank, index in enumerate(order):
        result[index] = levels[rank] + rank * gap
    return result
