"""`vpgtrans registry`: what the checkpoint registry holds."""

from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option

file_option = click.option(
    "--file",
    "index",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The registry file [default: $VPGTRANS_REGISTRY, else ./checkpoints_registry.yaml, else the package's].",
)


@click.group(name="registry")
def command() -> None:
    """Look into the checkpoint registry."""


@command.command(name="list", cls=Examples, epilog="vpgtrans registry list --json")
@file_option
@json_option
def list_entries(*, index: Path | None, as_json: bool) -> None:
    """List the entries."""
    entries = [{"name": name, **_plain(entry)} for name, entry in _load(index).entries.items()]
    if as_json:
        console.print_json(entries)
        return
    brief = [{k: v for k, v in entry.items() if not isinstance(v, dict | list)} for entry in entries]
    console.print_rows(brief, title="checkpoints")


@command.command(name="show", cls=Examples, epilog="vpgtrans registry show openmoji-qformer-smollm2-135m")
@click.argument("name")
@file_option
@json_option
def show_entry(name: str, *, index: Path | None, as_json: bool) -> None:
    """Show one entry, its files and their hashes."""
    entry = {"name": name, **_plain(_load(index).entry(name))}
    if as_json:
        console.print_json(entry)
    else:
        console.print_pairs(entry)


def _load(index: Path | None) -> Any:
    with console.loading():
        from vpgtrans.registry.index import load_registry
    return load_registry(index)


def _plain(entry: Any) -> dict[str, Any]:
    """An entry as plain data, without what it doesn't say."""
    return {key: value for key, value in entry.model_dump(mode="json").items() if key != "name" and value is not None}
