"""`vpgtrans registry show`: all that is known of one checkpoint."""

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option


@click.command(
    cls=Examples, short_help="Show one entry.", epilog="vpgtrans registry show openmoji-qformer-smollm2-135m"
)
@click.argument("name", metavar="NAME[@VERSION]")
@index_option
@json_option
def command(name: str, *, index: str | None, as_json: bool) -> None:
    """Show one entry, its files and their hashes."""
    with console.loading():
        from vpgtrans.registry.index import find, shown
    entry, place = find(name, index=index)
    document = {"index": shown(place)} | entry.model_dump(mode="json")
    if as_json:
        console.print_json(document)
    else:
        console.print_pairs(document)
