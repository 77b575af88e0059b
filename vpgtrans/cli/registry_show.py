"""`vpgtrans registry show`: all that is known of one checkpoint."""

from typing import TYPE_CHECKING, Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, index_option, json_option

if TYPE_CHECKING:
    from vpgtrans.registry.entry import Entry


@click.command(
    cls=Examples,
    short_help="Show one entry, its lineage and its card.",
    epilog="""
    vpgtrans registry show openmoji-qformer-smollm2-135m
    vpgtrans registry show openmoji-qformer-smollm2-135m@1.1.0 --json
    """,
)
@click.argument("name", metavar="NAME[@VERSION]")
@index_option
@json_option
def command(name: str, *, index: str | None, as_json: bool) -> None:
    """Show what an index says of a checkpoint, what it was made from, and its card where that is at hand.

    Nothing is fetched but an index at a URL.
    """
    with console.loading():
        from vpgtrans.registry.ancestry import ancestry
        from vpgtrans.registry.card import read_card
        from vpgtrans.registry.index import find, shown
    entry, place = find(name, index=index)
    if as_json:
        console.print_json({"index": shown(place)} | entry.model_dump(mode="json"))
        return
    _print_facts(entry, shown(place))
    console.print_tree(ancestry(entry, lambda parent: find(parent, index=index).entry))
    card = read_card(entry, index=place)
    if card is None:
        console.print_line(f"\nits card is not at hand: vpgtrans registry pull {entry.name}")
    else:
        console.print_line("")
        console.print_markdown(card)


def _print_facts(entry: "Entry", place: str) -> None:
    llm, encoder, interface = entry.base.llm, entry.base.encoder, entry.interface
    licences = [f"{base.licence} ({base.of})" for base in entry.licence.bases]
    pairs: dict[str, Any] = {
        "what": entry.description,
        "kind": entry.kind,
        "status": entry.status if entry.reason is None else f"{entry.status}: {entry.reason}",
        "index": place,
        "locations": entry.locations,
        "LLM": _joined(
            llm.reference,
            llm.revision and f"revision {llm.revision}",
            llm.architecture,
            f"width {llm.width}",
            llm.layers and f"{llm.layers} layers",
            f"{llm.vocabulary:,} words",
        ),
        "encoder": encoder
        and _joined(encoder.kind, encoder.reference, f"width {encoder.width}", f"{encoder.patches} patches"),
        "visual tokens": _joined(
            f"{interface.visual_tokens} of width {interface.width}",
            interface.projected and f"projected to {interface.projected}",
            f"from images of {interface.image_size} pixels",
        ),
        "prompt": repr(interface.prompt),
        "licence": entry.licence.spdx,
        "of its bases": licences or None,
        "data": [f"{_joined(data.name, data.split)} ({data.licence or 'licence unknown'})" for data in entry.data],
        "metrics": [
            {
                "data": _joined(metric.data, metric.split, sep=":"),
                "metric": metric.name,
                "value": metric.value,
                "95 %": metric.interval and "{:.4g} to {:.4g}".format(*metric.interval),
                "samples": metric.count,
            }
            for metric in entry.metrics
        ],
        "files": [{"path": file.path, "bytes": file.size, "sha256": f"{file.sha256[:16]}…"} for file in entry.files],
    }
    console.print_pairs({key: value for key, value in pairs.items() if value}, title=entry.name)


def _joined(*words: str | int | None, sep: str = ", ") -> str:
    return sep.join(str(word) for word in words if word)
