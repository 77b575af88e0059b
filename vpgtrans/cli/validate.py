"""`vpgtrans validate`: check a recipe without loading weights."""

from pathlib import Path

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option, read_recipe, recipe_arguments


@click.command(
    cls=Examples,
    short_help="Check a recipe without loading weights.",
    epilog="""
    vpgtrans validate recipes/quickstart.yaml
    vpgtrans validate recipes/quickstart.yaml target.llm=path/to/model
    vpgtrans validate my.yaml --print > resolved.yaml
    vpgtrans validate my.yaml --schema-only
    """,
)
@recipe_arguments
@click.option("--schema-only", is_flag=True, help="Check keys and values; look up no model and no data.")
@click.option("--print", "show", is_flag=True, help="Print the recipe with every default written out.")
@json_option
def command(recipe: Path, overrides: tuple[str, ...], *, schema_only: bool, show: bool, as_json: bool) -> None:
    """Check a recipe: keys and values, that its references resolve, that widths fit.

    Of models on the hub only configs and tokenizers are downloaded; neither LLMs nor encoders are loaded.
    """
    if show and as_json:
        raise click.UsageError("--print and --json exclude each other.")
    checked = read_recipe(recipe, overrides)
    if show:
        from vpgtrans.recipe import dump

        click.echo(dump(checked), nl=False)
        return
    found: dict[str, object] = {"recipe": str(recipe), "valid": True}
    if not schema_only:
        with console.loading():
            from vpgtrans import runs
        found |= runs.validate(checked)
    if as_json:
        console.print_json(found)
    else:
        console.print_pairs(found)
