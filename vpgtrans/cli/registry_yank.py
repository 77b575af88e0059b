"""`vpgtrans registry yank`: say that an entry should no longer be used."""

from pathlib import Path

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option


@click.command(
    cls=Examples,
    short_help="Say that an entry should no longer be used.",
    epilog='vpgtrans registry yank emoji-gemma@1.0.0 --reason "trained on the test split; take 1.0.1"',
)
@click.argument("name", metavar="ID@VERSION")
@click.option("--reason", required=True, metavar="TEXT", help="What is wrong, and what to take in its place.")
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The index that has it [default: the first of $VPGTRANS_REGISTRY, ./checkpoints_registry.yaml and the "
    "package's that does].",
)
@json_option
def command(name: str, *, reason: str, index: Path | None, as_json: bool) -> None:
    """Mark an entry as yanked. Its files stay where they are, and who names it with its version still gets it, with a
    warning; without a version it is no longer chosen.
    """
    with console.loading():
        from vpgtrans.registry.edit import yank
    entry, place = yank(name, reason=reason, index=None if index is None else str(index))
    if as_json:
        console.print_json({"name": entry.name, "index": str(place), "status": entry.status, "reason": entry.reason})
    else:
        console.print_line(f"yanked {entry.name} in {place}: {entry.reason}")
