"""`vpgtrans caption`: say what is in an image."""

from pathlib import Path

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, device_option, force_option, json_option, parts_options, trust_option


@click.command(
    cls=Examples,
    short_help="Say what is in an image.",
    epilog="""
    vpgtrans caption runs/quickstart photo.png
    vpgtrans caption runs/quickstart/vlm *.png --json
    vpgtrans caption registry:openmoji-qformer-smollm2-135m cat.png --prompt "<image> A drawing of"
    """,
)
@click.argument("vlm", metavar="VLM")
@click.argument(
    "images",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path),
    metavar="IMAGE...",
)
@click.option("--prompt", metavar="TEXT", help="Text around the image [default: what the VLM was trained with].")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N")
@parts_options
@device_option
@trust_option
@force_option
@json_option
def command(
    vlm: str,
    images: tuple[Path, ...],
    *,
    prompt: str | None,
    max_new_tokens: int,
    device: str,
    trust_remote_code: bool,
    projector: str | None,
    adapter: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Print a caption for each image.

    VLM is a VLM directory, a run, or registry:NAME.
    """
    with console.loading():
        from vpgtrans import runs
    found = runs.caption(
        vlm,
        list(images),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        projector=projector,
        adapter=adapter,
        force=force,
    )
    if as_json:
        console.print_json(found)
        return
    for item in found:
        # a single image needs no name beside its caption
        click.echo(item["caption"] if len(images) == 1 else f"{item['image']}: {item['caption']}")
