"""`vpgtrans evaluate`: how well does a VLM caption?"""

from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.data_source import read_keys, source_options
from vpgtrans.cli.options import Examples, device_option, force_option, json_option, parts_options, trust_option


@click.command(
    cls=Examples,
    short_help="Measure a VLM's captions and answers.",
    epilog="""
    vpgtrans evaluate runs/quickstart --data openmoji:test
    vpgtrans evaluate runs/quickstart/vlm --data openmoji:test --data openmoji:test-unseen --samples 200
    vpgtrans evaluate runs/quickstart --data captions.parquet --caption text --json
    vpgtrans evaluate runs/quickstart --data questions.jsonl --question question --answer answers
    """,
)
@click.argument("vlm", metavar="VLM")
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="DATASET[:SPLIT]",
    help="What to measure on: openmoji, a file, a directory or hf:ORG/NAME. May be given several times.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Use the first N samples of each [default: all]."
)
@parts_options
@device_option
@trust_option
@force_option
@json_option
@source_options
def command(
    vlm: str,
    *,
    data: tuple[str, ...],
    samples: int | None,
    device: str,
    trust_remote_code: bool,
    projector: str | None,
    adapter: str | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Print validation loss, exact match, token F1 and CIDEr of a VLM's captions and answers, each with the ends of
    its 95 % interval (bootstrap over the samples).

    VLM is a VLM directory, a run, or registry:NAME. The options that name columns hold for every data set.
    """
    with console.loading():
        from vpgtrans import runs
    keys = read_keys(options)
    found = runs.evaluate(
        vlm,
        data=list(data),
        keys=keys,
        samples=samples,
        device=device,
        trust_remote_code=trust_remote_code,
        projector=projector,
        adapter=adapter,
        force=force,
    )
    if as_json:
        console.print_json(found)
    elif found and all(isinstance(value, dict) for value in found.values()):
        console.print_rows([{"data": name} | _with_intervals(scores) for name, scores in found.items()], title=vlm)
    else:
        console.print_pairs(found, title=vlm)


def _with_intervals(scores: dict[str, Any]) -> dict[str, Any]:
    """Each mean with its interval in one cell."""
    ends = scores.get("intervals", {})
    return {
        name: f"{console.cell(value)} [{' – '.join(map(console.cell, ends[name]))}]" if name in ends else value
        for name, value in scores.items()
        if name != "intervals"
    }
