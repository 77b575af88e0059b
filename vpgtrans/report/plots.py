"""Charts: a run's curves and a comparison's, as themed inline SVG and as a PNG for a README.

Text stays text in the SVG and is set in the page's font. Each chart is drawn once wide and once narrow with the same
text size, since one drawing scaled to a phone has unreadable labels.
"""

import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from vpgtrans.errors import DataError, OutputError
from vpgtrans.report.curves import Arm, RunCurves, compare_arms, scratch_best, smooth, thin
from vpgtrans.report.format import count, decimal, learning_rate, ratio
from vpgtrans.report.style import LIGHT, arm_styles, inline_svg

Width = Literal["wide", "narrow"]

_PIXELS: dict[str, int] = {"wide": 960, "narrow": 330}
_RC: dict[str, Any] = {
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


def _drawing() -> AbstractContextManager[None]:
    """Charts look the same whatever style the caller of a verb has set for figures of its own."""
    return style.context(_RC, after_reset=True)


def run_chart(curves: RunCurves, *, prefix: str, title: str, description: str) -> Markup:
    """Losses and learning rate of one run by samples seen, wide and narrow, as HTML."""
    return _both(lambda width: _run_figure(curves, width=width), prefix=prefix, title=title, description=description)


def compare_chart(arms: Sequence[Arm], *, prefix: str, title: str, description: str) -> Markup:
    """Validation loss by samples seen of each arm, wide and narrow, as HTML."""
    return _both(lambda width: _compare_figure(arms, width=width), prefix=prefix, title=title, description=description)


def histogram_chart(
    bars: Sequence[Mapping[str, float]], *, unit: str, prefix: str, title: str, description: str
) -> Markup:
    """Bars of `from`, `to` and `share`, as HTML: one width for both, since two stand side by side on a wide page."""
    svg = _svg(_histogram_figure(bars, unit=unit), prefix=prefix, title=title, description=description)
    return Markup(f'<div class="chart">{svg}</div>')


def run_png(curves: RunCurves) -> bytes:
    """What `run_chart` shows, as a PNG 1,600 pixels wide on a light page."""
    with _drawing():
        return _png(_run_figure(curves, width="wide"))


def compare_plot(summary: dict[str, Any], png: Path) -> Path:
    """Draw a comparison's summary as a PNG 1,600 pixels wide and return its path.

    Raises:
        DataError: the summary isn't a comparison's.
        OutputError: the file can't be written.
    """
    arms = compare_arms(summary)
    with _drawing():
        drawn = _png(_compare_figure(arms, width="wide"))
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        png.write_bytes(drawn)
    except OSError as error:
        raise OutputError(f"{png}: can't write the plot ({error})") from error
    return png


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    dpi = 72 * 1600 / _PIXELS["wide"]
    figure.savefig(stream, format="png", dpi=dpi, facecolor=LIGHT["page"], metadata={"Software": None})
    return stream.getvalue()


def _both(draw: Any, *, prefix: str, title: str, description: str) -> Markup:
    parts = []
    for width in ("wide", "narrow"):
        with _drawing():
            figure = draw(width)
        svg = _svg(figure, prefix=f"{prefix}-{width}", title=title, description=description)
        parts.append(f'<div class="chart {width}">{svg}</div>')
    return Markup("\n".join(parts))


def _svg(figure: Figure, *, prefix: str, title: str, description: str) -> str:
    with _drawing():
        FigureCanvasSVG(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(stream.getvalue(), prefix=prefix, title=str(escape(title)), description=str(escape(description)))


def _figure(width: Width, height: float) -> Figure:
    return Figure(figsize=(_PIXELS[width] / 72, height / 72))  # an SVG point becomes one CSS pixel


# --- one run ------------------------------------------------------------------------------------


_TITLE, _ROW, _AXIS, _BETWEEN = 30, 17, 56, 46
"""Pixels of a run's chart: title row, row of labels, the samples axis, and between both panels."""


def _run_figure(curves: RunCurves, *, width: Width) -> Figure:
    wide = width == "wide"
    left, right = (64, 100) if wide else (44, 12)
    inner = _PIXELS[width] - left - right
    end = max([stage[2] for stage in curves.stages] + [1.0])
    stages = _stage_labels(curves, scale=inner / end, limit=inner + right - 4)
    rows = 1 + max([row for *_, row in stages], default=0)
    keys = 0 if wide else _ROW + 8  # on a phone, a row of line keys in place of labels at the curves' ends
    part_keys = _ROW + 4 if any(curves.rates) else 0
    head, between = _TITLE + _ROW * rows + keys, _BETWEEN + part_keys
    panels = (280, 95) if wide else (240, 80)
    height = head + sum(panels) + between + _AXIS
    figure = _figure(width, height)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=panels)
    figure.subplots_adjust(
        left=left / _PIXELS[width],
        right=1 - right / _PIXELS[width],
        top=1 - head / height,
        bottom=_AXIS / height,
        hspace=between / (sum(panels) / 2),
    )
    _losses(losses, curves, end=end, wide=wide)
    losses.set_title("Loss (nats a token)", loc="left", color=LIGHT["muted"], fontsize=12, pad=_ROW * rows + keys + 5)
    if keys:
        _line_keys(losses, above=_ROW * rows + 6)
    _rates(rates, curves)
    rates.set_title("Learning rate", loc="left", color=LIGHT["muted"], fontsize=12, pad=6 + part_keys)
    if part_keys:
        _line_keys(rates, above=1)
    rates.set_xlabel("samples seen")
    rates.set_xlim(0, end)
    rates.xaxis.set_major_locator(mpl.ticker.MaxNLocator(8 if wide else 4, steps=[1, 2, 2.5, 5, 10]))
    rates.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    for axes in (losses, rates):
        axes.grid(axis="y")
        axes.tick_params(length=0, pad=5)
        for _, start, _ in curves.stages[1:]:
            axes.axvline(start, color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)))
    for text, x, row in stages:
        losses.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(x, 5 + _ROW * row), textcoords="offset points",
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    return figure


def _losses(axes: Axes, curves: RunCurves, *, end: float, wide: bool) -> None:
    ends = []
    if curves.train:
        window = max(1, len(curves.train) // 25)
        if window > 2:
            axes.plot(*_xy(thin(curves.train)), color=LIGHT["series-2"], linewidth=0.7, alpha=0.35)
        line = thin(smooth(curves.train, window=window))
        axes.plot(*_xy(line), color=LIGHT["series-2"], linewidth=1.6, linestyle=(0, (2, 1.2)), label="training")
        ends.append(("training", line[-1][1], "series-2"))
    if curves.validation:
        axes.plot(
            *_xy(curves.validation), color=LIGHT["accent"], linewidth=2.2, marker="o", markersize=3.6,
            label="validation",
        )  # fmt: skip
        ends.append(("validation", curves.validation[-1][1], "accent"))
    _log_y(axes, [value for _, value in curves.validation + curves.train])
    if best := curves.best:
        axes.plot(
            *best,
            marker="o",
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=LIGHT["accent"],
            markeredgewidth=1.6,
            clip_on=False,
        )
        # Below the point is never the validation curve; above, where below is the axis.
        below = axes.transAxes.inverted().transform(axes.transData.transform(best))[1] > 0.15
        axes.annotate(
            f"best {decimal(best[1])}",
            best,
            xytext=(0, -9 if below else 9),
            textcoords="offset points",
            ha="right" if best[0] > 0.85 * end else "left" if best[0] < 0.15 * end else "center",
            va="top" if below else "bottom",
            color=LIGHT["accent"],
            fontweight="bold",
            bbox={"facecolor": LIGHT["page"], "edgecolor": "none", "pad": 1, "alpha": 0.85},
        )
    if wide:
        _direct_labels(axes, ends)


def _rates(axes: Axes, curves: RunCurves) -> None:
    """Learning rates, each stage a line of its own: linear from zero, unless one stage's are lost beside another's."""
    peaks = []
    styles = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
    lines = []
    for index, (part, points) in enumerate(curves.rates.items()):
        label = part
        for _, start, stop in curves.stages:
            inside = [point for point in points if start < point[0] <= stop]
            if not inside:
                continue
            peaks.append(max(value for _, value in inside))
            style = styles[index % len(styles)]
            line = axes.plot(*_xy(thin(inside)), color=LIGHT["ink"], linewidth=1.5, linestyle=style, label=label)
            lines += line
            label = "_"  # one key a part
    peaks = [peak for peak in peaks if peak > 0]
    if not peaks:
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: learning_rate(value)))
    if max(peaks) <= 15 * min(peaks):
        axes.set_ylim(0, max(peaks) * 1.08)
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
        return
    low, high = min(peaks) / 20, max(peaks) * 1.6  # a cosine's end, zero, has no place on a log axis: it ends at `low`
    for drawn in lines:
        drawn.set_ydata(np.maximum(np.asarray(drawn.get_ydata(), dtype=float), low))
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_steps(low, high, (1.0,)) or [max(peaks)]))
    axes.yaxis.set_minor_locator(NullLocator())


def _line_keys(axes: Axes, *, above: float) -> None:
    """Keys of the labelled lines in a row, `above` points over the axes."""
    height = axes.bbox.height / axes.figure.dpi * 72
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1 + above / height), ncols=4, frameon=False, borderpad=0,
        borderaxespad=0, handlelength=1.7, handletextpad=0.5, columnspacing=1.1, fontsize=11.5, labelcolor="linecolor",
    )  # fmt: skip


def _stage_labels(curves: RunCurves, *, scale: float, limit: float) -> list[tuple[str, float, int]]:
    """(text, points right of the axis, row) of each stage that took samples and finds room."""
    spans, texts = [], []
    for name, start, stop in curves.stages:
        if stop <= start:
            continue
        spans.append((start * scale + (5 if start else 0), stop * scale))
        narrow = _text_width(name) > spans[-1][1] - spans[-1][0]
        texts.append(f"{name}: {count(stop - start)} samples" if narrow else name)
    places = label_rows(spans, [_text_width(text) for text in texts], limit=limit)
    return [(text, *place) for text, place in zip(texts, places, strict=True) if place is not None]


def _text_width(text: str) -> float:
    font = FontProperties(family="DejaVu Sans", weight="bold")
    return float(TextPath((0, 0), text, size=_RC["font.size"], prop=font).get_extents().width) if text.strip() else 0.0


def label_rows(
    spans: Sequence[tuple[float, float]], widths: Sequence[float], *, limit: float, gap: float = 12, rows: int = 3
) -> list[tuple[float, int] | None]:
    """Where labels stand that name the spans below them: (left end, row), none on another; None where no row has room.

    The widest spans choose first and get row 0; a label stands at its span's start, or further left where it would
    pass `limit`.
    """
    placed: dict[int, tuple[float, int]] = {}
    for index in sorted(range(len(spans)), key=lambda index: spans[index][0] - spans[index][1]):
        x = max(0.0, min(spans[index][0], limit - widths[index]))
        for row in range(rows):
            others = [(other, place[0]) for other, place in placed.items() if place[1] == row]
            if all(x >= left + widths[o] + gap or x + widths[index] + gap <= left for o, left in others):
                placed[index] = (x, row)
                break
    return [placed.get(index) for index in range(len(spans))]


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


# --- data ---------------------------------------------------------------------------------------


def _histogram_figure(bars: Sequence[Mapping[str, float]], *, unit: str) -> Figure:
    with _drawing():
        figure = Figure(figsize=(440 / 72, 210 / 72))
        figure.subplots_adjust(left=0.02, right=0.98, top=0.98, bottom=0.26)
        axes = figure.subplots()
        places = range(len(bars))
        axes.bar(places, [bar["share"] for bar in bars], width=0.9, color=LIGHT["accent"])
        for place, bar in zip(places, bars, strict=True):
            if bar["share"]:
                text = f"{100 * bar['share']:.0f}" if bar["share"] >= 0.005 else "<1"
                axes.annotate(
                    text, (place, bar["share"]), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=11
                )
        # a tick where each bar begins, as many as can be read
        step = max(1, math.ceil(sum(len(f"{bar['from']:,.0f}") + 2 for bar in bars) / 46))
        axes.set_xticks([place - 0.45 for place in places][::step])
        axes.set_xticklabels([f"{bar['from']:,.0f}" for bar in bars][::step], ha="left")
        axes.set_xlim(-0.6, max(len(bars), 4) - 0.4)
        axes.set_ylim(0, 1.12 * max(bar["share"] for bar in bars))
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"{unit}, from; % of all above the bars")
        axes.tick_params(length=0, pad=5)
    return figure


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


def _direct_labels(axes: Axes, labels: Sequence[tuple[str, float, str]]) -> None:
    """Names at the curves' right ends, moved apart where they would overlap."""
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
