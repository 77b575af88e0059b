"""`vpgtrans doctor`: what this machine can do, and what is missing."""

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option


@click.command(
    cls=Examples,
    short_help="What this machine can do, and what is missing.",
    epilog="vpgtrans doctor\nvpgtrans doctor --json",
)
@json_option
def command(*, as_json: bool) -> None:
    """Say what this machine can do: versions, processor, memory, GPU, cache, and which extras are missing."""
    with console.loading():
        from vpgtrans.doctor import doctor
    found = doctor()
    if as_json:
        console.print_json(found)
        return
    packages = found.pop("packages")
    for title, values in found.items():
        if isinstance(values, dict):
            console.print_pairs(values, title=title)
    console.print_rows(packages, title="packages")
    for advice in found["advice"]:
        click.echo(f"- {advice}")
