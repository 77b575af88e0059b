"""The page of a recipe's data: what each source holds, how long samples are, and samples as the LLM sees them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vpgtrans import __version__
from vpgtrans.data.stats import Shown
from vpgtrans.report import format as fmt
from vpgtrans.report.html import Cell, Head, Table, write_page
from vpgtrans.report.plots import histogram_chart
from vpgtrans.vision.preprocess import thumbnail

_CHARTS = {
    "length": ("Tokens a sample, visual ones included", "tokens"),
    "answer": ("Tokens that the loss counts, a sample", "tokens"),
    "width": ("Width of images", "pixels"),
    "height": ("Height of images", "pixels"),
}
"""Key of the histograms -> title and unit."""
_TOKENS = {"length": "in all", "text": "words", "visual": "visual", "answer": "learnt"}
_CUT = {"turns": "later turns left out", "answer": "the answer's end left out"}


def write_data_report(target: Path, found: dict[str, Any], shown: Sequence[Shown]) -> Path:
    """Write the page of what `runs.data_stats` found, with the samples to picture; returns `target`.

    Raises:
        OutputError: the page can't be written.
    """
    train, validation = found["train"], found["validation"]
    return write_page(
        target,
        "data.html.jinja",
        kind="Data of a recipe, as its LLM sees it",
        title=f"{found['recipe']}: data · vpgtrans",
        headline=_headline(found),
        lead=[_measured(train["mixture"])],
        measured="",
        key_figures=_key_figures(train["mixture"]),
        version=__version__,
        train=_part(train),
        validation=_part(validation),
        charts=_charts(train["histograms"]),
        padding=_padding(found["padding"]),
        samples=[_sample(entry) for entry in shown],
        prompt=[(key.replace("_", " "), fmt.plain(value).replace("\n", "↵")) for key, value in found["prompt"].items()],
    )


def _headline(found: dict[str, Any]) -> str:
    mixture, sources = found["train"]["mixture"], found["train"]["sources"]
    length = mixture["tokens"]["length"]
    text = f"{found['recipe']}: {fmt.count(mixture['rows'])} training samples"
    text += f" from {len(sources)} sources" if len(sources) > 1 else ""
    return text + (f", {fmt.count(length['mean'])} tokens each for {fmt.name(found['llm'])}." if length else ".")


def _measured(mixture: dict[str, Any]) -> str:
    if mixture["measured"] == "all":
        return "Every row was measured. Images were not decoded: their sizes come from their headers."
    return (
        f"A sample: {fmt.count(mixture['seen'])} of {fmt.count(mixture['rows'])} rows were measured, and figures are "
        "estimates from them. Images were not decoded: their sizes come from their headers."
    )


def _key_figures(mixture: dict[str, Any]) -> list[tuple[str, str]]:
    seen = max(1, mixture["seen"])
    rows = [("rows", fmt.count(mixture["rows"]))]
    if mixture["images_per_sample"] is not None:
        rows.append(("images a sample", fmt.decimal(mixture["images_per_sample"], 2)))
    for name, what in (("length", "tokens a sample"), ("answer", "of them learnt")):
        if mixture["tokens"][name] is not None:
            rows.append((what, fmt.count(mixture["tokens"][name]["mean"])))
    rows.append(("of rows left out", fmt.percent((mixture["bad"] + mixture["dropped"]) / seen)))
    return rows


def _part(part: dict[str, Any]) -> dict[str, Any]:
    rows = [*part["sources"], {"source": "all", **part["mixture"]}] if len(part["sources"]) > 1 else part["sources"]
    return {
        "counts": _counts(rows, several=len(part["sources"]) > 1),
        "lengths": [_lengths(row) for row in rows],
        "left_out": [
            *((row["source"], f"{fmt.count(count)} dropped: {rule}") for row in part["sources"]
              for rule, count in row["rules"].items()),
            *((entry["where"], entry["reason"]) for row in part["sources"] for entry in row["problems"]),
        ],
    }  # fmt: skip


def _counts(rows: Sequence[dict[str, Any]], *, several: bool) -> Table:
    heads = ["Rows", "Measured", "Used", "Bad", "Dropped", "Truncated", "Images", "Draws", "Tokens"]
    terms = {"Dropped": "by a rule", "Draws": "share", "Tokens": "share", "Bad": "unreadable"}
    table = Table(
        "Rows: measured = used + bad + dropped",
        [Head("Source", numeric=False), *(Head(head, terms.get(head, "")) for head in heads)],
        total=several,
        cards=True,
        dense=True,
    )
    for row in rows:
        table.add(
            Cell(str(row["source"]), below=str(row.get("layout", ""))),
            *(fmt.count(row[key]) for key in ("rows", "seen", "used", "bad", "dropped")),
            fmt.count(sum(row["truncated"].values())),
            fmt.count(row["images"]),
            *(fmt.percent(row.get(key)) for key in ("share_of_draws", "share_of_tokens")),
        )
    return table


def _lengths(row: dict[str, Any]) -> Table:
    table = Table(
        f"{row['source']}: tokens a sample, pixels an image",
        [Head("Of", numeric=False), *map(Head, ("Mean", "Min", "Median", "95 %", "Max"))],
    )
    measured = {f"tokens, {name}": row["tokens"][key] for key, name in _TOKENS.items()}
    for what, figures in (measured | {"width": row["width"], "height": row["height"]}).items():
        if figures is not None:
            values = [fmt.count(figures[key]) for key in ("min", "median", "p95", "max")]
            table.add(what, fmt.decimal(figures["mean"], 1), *values)
    return table


def _charts(histograms: dict[str, Any]) -> list[tuple[str, Markup]]:
    charts = []
    for key, (title, unit) in _CHARTS.items():
        bars = histograms[key]
        if bars:
            largest = max(bars, key=lambda bar: bar["share"])
            description = (
                f"Most, {fmt.percent(largest['share'])}, lie between {largest['from']} and {largest['to']} {unit}."
            )
            charts.append(
                (title, histogram_chart(bars, unit=unit, prefix=f"of-{key}", title=title, description=description))
            )
    return charts


def _padding(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "Share of the positions of a batch that are padding",
        [Head("Stage", numeric=False), Head("Samples at once"), Head("Samples"), Head("As drawn"), Head("If sorted")],
    )
    for row in rows:
        shares = (fmt.percent(row[key]) for key in ("as_drawn", "if_sorted"))
        table.add(row["stage"], fmt.count(row["at_once"]), fmt.count(row["samples"]), *shares)
    return table


def _sample(shown: Shown) -> dict[str, Any]:
    encoded = shown.encoded
    images = shown.source.open(shown.sample)[: encoded.images]
    facts = f"{fmt.count(len(encoded))} tokens, {fmt.count(encoded.answers)} learnt"
    return {
        "id": shown.sample.id,
        "images": [f"data:image/png;base64,{thumbnail(image, side=240)}" for image in images],
        "facts": f"{facts}; {_CUT[encoded.cut]}" if encoded.cut else facts,
        "pieces": shown.pieces,
    }
