"""`vpgtrans schema`: what editors need to complete and check recipes."""

from pathlib import Path

import click

from vpgtrans.cli.options import Examples


@click.command(
    cls=Examples,
    short_help="Print the JSON schema of recipes, for editors.",
    epilog="""
    vpgtrans schema > recipe.schema.json
    vpgtrans schema --output recipes/recipe.schema.json
    """,
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write it to a file."
)
def command(*, output: Path | None) -> None:
    """Print the JSON schema of recipes.

    Editors with a YAML language server complete and check a recipe whose first line names the schema, by a path from
    the recipe's directory: `# yaml-language-server: $schema=recipe.schema.json`.
    """
    from vpgtrans.recipe_schema import schema_text

    if output is None:
        click.echo(schema_text(), nl=False)
        return
    try:
        output.write_text(schema_text(), encoding="utf-8")
    except OSError as error:
        from vpgtrans.errors import OutputError

        raise OutputError(f"{output}: can't be written: {error.strerror or error}") from error
