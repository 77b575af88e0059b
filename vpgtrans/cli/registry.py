"""`vpgtrans registry`: what the checkpoint registry holds."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option

if TYPE_CHECKING:
    from vpgtrans.registry.index import Registry

file_option = click.option(
    "--file",
    "index",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The registry file [default: $VPGTRANS_REGISTRY, else ./checkpoints_registry.yaml, else the package's].",
)


@click.group(name="registry", short_help="Look into the checkpoint registry.")
def command() -> None:
    """Look into the checkpoint registry."""


@command.command(name="list", cls=Examples, epilog="vpgtrans registry list --json")
@file_option
@json_option
def list_entries(*, index: Path | None, as_json: bool) -> None:
    """List the entries."""
    entries = [entry.model_dump(mode="json") for entry in _load(index)]
    if as_json:
        console.print_json(entries)
        return
    console.print_rows(
        [
            {
                "id": entry["id"],
                "version": entry["version"],
                "kind": entry["kind"],
                "LLM": entry["llm"]["reference"],
                "visual tokens": entry["interface"]["visual_tokens"],
                "MB": round(sum(file["size"] for file in entry["files"]) / 1e6, 1),
                "licence": entry["licence"],
                "status": entry["status"],
            }
            for entry in entries
        ],
        title="checkpoints",
    )


@command.command(name="show", cls=Examples, epilog="vpgtrans registry show openmoji-qformer-smollm2-135m")
@click.argument("name", metavar="NAME[@VERSION]")
@file_option
@json_option
def show_entry(name: str, *, index: Path | None, as_json: bool) -> None:
    """Show one entry, its files and their hashes."""
    entry = _load(index).entry(name).model_dump(mode="json")
    if as_json:
        console.print_json(entry)
    else:
        console.print_pairs(entry)


def _load(index: Path | None) -> "Registry":
    with console.loading():
        from vpgtrans.registry.index import load_registry
    return load_registry(index)
