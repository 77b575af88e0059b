"""`vpgtrans evaluate`: how well does a VLM caption?"""

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, device_option, json_option, trust_option


@click.command(
    cls=Examples,
    short_help="Measure a VLM's captions.",
    epilog="""
    vpgtrans evaluate runs/quickstart --data openmoji:test
    vpgtrans evaluate runs/quickstart/vlm --data openmoji:test --data openmoji:test-unseen --samples 200
    vpgtrans evaluate runs/quickstart --data captions.parquet --caption text --json
    """,
)
@click.argument("vlm", metavar="VLM")
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="DATASET[:SPLIT]",
    help="Images with captions: openmoji, a file, a directory or hf:ORG/NAME. May be given several times.",
)
@click.option("--image", metavar="COLUMN", help="Column of the image [default: image].")
@click.option("--caption", metavar="COLUMN", help="Column of the caption [default: caption].")
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="Use the first N samples of each [default: all]."
)
@device_option
@trust_option
@json_option
def command(
    vlm: str,
    *,
    data: tuple[str, ...],
    image: str | None,
    caption: str | None,
    samples: int | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Print validation loss, exact match, token F1 and CIDEr of a VLM on images with captions.

    VLM is a VLM directory, a run, or registry:NAME.
    """
    with console.loading():
        from vpgtrans import runs
    columns = {role: column for role, column in (("image", image), ("caption", caption)) if column is not None}
    found = runs.evaluate(
        vlm, data=list(data), columns=columns, samples=samples, device=device, trust_remote_code=trust_remote_code
    )
    if as_json:
        console.print_json(found)
    elif found and all(isinstance(value, dict) for value in found.values()):
        console.print_rows([{"data": name, **scores} for name, scores in found.items()], title=vlm)
    else:
        console.print_pairs(found, title=vlm)
