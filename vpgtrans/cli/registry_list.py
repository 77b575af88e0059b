"""`vpgtrans registry list`: what the indexes hold."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option

if TYPE_CHECKING:
    from vpgtrans.registry.index import Registry


@click.command(cls=Examples, short_help="List the entries.", epilog="vpgtrans registry list --json")
@index_option
@json_option
def command(*, index: str | None, as_json: bool) -> None:
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


def _load(index: str | None) -> "Registry":
    with console.loading():
        from vpgtrans.registry.index import load_registry
    return load_registry(None if index is None else Path(index))
