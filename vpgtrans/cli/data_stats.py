"""`vpgtrans data stats`: what is in the data, and how the LLM sees it?"""

from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option, read_recipe, recipe_arguments

HISTOGRAMS = {
    "length": "tokens a sample, visual ones included",
    "answer": "tokens that the loss counts, a sample",
    "width": "width of images",
    "height": "height of images",
}
"""Key -> title."""


def _count_or_all(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value} is neither a number of rows above zero nor all", context, parameter)
    return int(value)


@click.command(
    name="stats",
    cls=Examples,
    short_help="Rows, tokens, images, resolutions, padding; samples as the LLM sees them.",
    epilog="""
    vpgtrans data stats recipes/quickstart.yaml
    vpgtrans data stats recipes/quickstart.yaml --show 3
    vpgtrans data stats my.yaml prompt.max_tokens=512 --samples all --html data.html
    vpgtrans data stats my.yaml --json
    """,
)
@recipe_arguments
@click.option(
    "--samples",
    default="1000",
    show_default=True,
    callback=_count_or_all,
    metavar="N|all",
    help="Measure N rows of each source, always the same ones.",
)
@click.option(
    "--show", type=click.IntRange(min=0), default=0, metavar="N", help="Print N samples as the LLM sees them."
)
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write a page with pictures."
)
@json_option
def command(
    recipe: Path, overrides: tuple[str, ...], *, samples: int | None, show: int, html: Path | None, as_json: bool
) -> None:
    """Say what a recipe's data holds: rows, tokens, images, resolutions, padding.

    Nothing is trained and no model is loaded; images are not decoded, so only damaged headers are found.
    """
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
    found = runs.data_stats(checked, samples=samples, show=show, html=html)
    if as_json:
        console.print_json(found)
        return
    for name in ("train", "validation"):
        _print_part(name, found[name])
    padding = [row | {key: _percent(row[key]) for key in ("as_drawn", "if_sorted")} for row in found["padding"]]
    console.print_rows(padding, title="padding: share of a batch's positions")
    for shown in found["shown"]:
        _print_shown(shown)
    if html is not None:
        click.echo(f"page: {html}")


def _print_part(name: str, part: dict[str, Any]) -> None:
    rows = [*part["sources"], {"source": "all", **part["mixture"]}] if len(part["sources"]) > 1 else part["sources"]
    counts = ("source", "layout", "rows", "seen", "used", "bad", "dropped", "images")
    shares = ("share_of_draws", "share_of_tokens")
    console.print_rows(
        [
            {key: row.get(key) for key in counts}
            | {"truncated": sum(row["truncated"].values())}
            | {key: _percent(row.get(key)) for key in shares}
            for row in rows
        ],
        title=f"{name}: {_said_of(part['mixture'])}",
    )
    console.print_rows(
        [
            {"source": row["source"], "of": what, **figures}
            for row in rows
            for what, figures in [*row["tokens"].items(), ("width", row["width"]), ("height", row["height"])]
            if figures is not None
        ],
        title=f"{name}: tokens a sample, pixels an image",
    )
    for row in part["sources"]:
        for rule, count in row["rules"].items():
            console.print_line(f"dropped by a rule: {count:,} of {row['source']}: {rule}")
        for problem in row["problems"]:
            console.print_line(f"bad: {problem['where']}: {problem['reason']}")
    if name == "train":
        for key, title in HISTOGRAMS.items():
            console.print_histogram(part["histograms"][key], title=title)


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _said_of(mixture: dict[str, Any]) -> str:
    if mixture["measured"] == "all":
        return f"all {mixture['rows']:,} rows measured"
    return f"a sample, {mixture['seen']:,} of {mixture['rows']:,} rows measured; figures are estimates"


def _print_shown(shown: dict[str, Any]) -> None:
    cut = {"": "", "turns": ", later turns left out", "answer": ", the answer's end left out"}[shown["cut"]]
    console.print_line(
        f"\n{shown['source']}, {shown['id']}: {shown['ids']:,} ids, {shown['learnt']:,} learnt, "
        f"{shown['images']:,} image{'' if shown['images'] == 1 else 's'}{cut}"
    )
    console.print_pieces(shown["pieces"])
