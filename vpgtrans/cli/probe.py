"""`vpgtrans probe`: score every initialiser without training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, device_option, json_option, read_recipe, recipe_arguments


@click.command(
    cls=Examples,
    short_help="Score every initialiser without training.",
    epilog="""
    vpgtrans probe recipes/quickstart.yaml
    vpgtrans probe recipes/quickstart.yaml target.llm=path/to/model --json
    """,
)
@recipe_arguments
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Keep the table here as well.")
@device_option
@json_option
def command(recipe: Path, overrides: tuple[str, ...], *, output: Path | None, device: str, as_json: bool) -> None:
    """Score every way to initialise the target's projector, without training, and print the table.

    The row marked * is what `initialiser: auto` takes. The closed forms take some ten seconds each on a small pair, the
    sparse codes (omp) and the published SGD, which come last, minutes: Ctrl-C prints what is scored by then.
    """
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
    scored: list[dict[str, Any]] = []
    try:
        rows = runs.probe(checked, output=output, device=device, each=scored.append)
    except KeyboardInterrupt:
        if scored and not as_json:
            console.print_rows(table(scored), title=f"{checked.name}: the initialisers scored so far")
        raise
    if as_json:
        console.print_json(rows)
        return
    console.print_rows(table(rows), title=f"{checked.name}: initialisers before any training")
    for row in rows:
        if row["note"] and (row["chosen"] or row["prompt_norm_ratio"] is None):  # taken, or impossible
            click.echo(f"{row['name']}: {row['note']}")


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows as a terminal has room for them: rounded, the interval in one column, what is null left out."""
    return [
        {
            "": "*" if row["chosen"] else "",
            "initialiser": row["name"],
            "pairs": row["pairs"],
            "cover": _rounded(row["coverage"], ".0%"),
            "cosine": _rounded(row["centred_cosine"], ".3f"),
            "R@1": _rounded(row["recall_at_1"], ".3f"),
            "copy gap": _rounded(row["copy_gap_recovered"], ".3f"),
            "loss": _rounded(row["step0_loss"], ".3f"),
            "image gap": _rounded(row["image_gap"], "+.3f"),
            "95 %": None
            if row["image_gap_low"] is None
            else f"{row['image_gap_low']:+.3f} to {row['image_gap_high']:+.3f}",
            "norm": _rounded(row["prompt_norm_ratio"], ".2f"),
            "s": _rounded(row["seconds"], ".2f"),
            "MB": round(row["memory_bytes"] / 1e6),
        }
        for row in rows
    ]


def _rounded(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
