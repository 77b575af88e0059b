"""`vpgtrans probe`: score every initialiser without training."""

from pathlib import Path

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option, read_recipe, recipe_arguments


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
@json_option
def command(recipe: Path, overrides: tuple[str, ...], *, output: Path | None, as_json: bool) -> None:
    """Score every way to initialise the target's projector, without training, and print the table."""
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
    rows = runs.probe(checked, output=output)
    if as_json:
        console.print_json(rows)
    else:
        console.print_rows(rows, title=f"{checked.name}: initialisers before any training")
