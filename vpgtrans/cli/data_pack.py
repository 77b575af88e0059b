"""`vpgtrans data pack`: how full would packs be?"""

from pathlib import Path

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option, read_recipe, recipe_arguments
from vpgtrans.data.config import LONGEST_PACK


@click.command(
    name="pack",
    cls=Examples,
    short_help="Plan which samples would share a row, and say how full rows would be.",
    epilog="""
    vpgtrans data pack recipes/quickstart.yaml
    vpgtrans data pack my.yaml --max-tokens 4096 --max-images 8 --json
    """,
)
@recipe_arguments
@click.option(
    "--max-tokens", type=click.IntRange(1, LONGEST_PACK), metavar="N", help="Tokens of a pack [default: data.packing]."
)
@click.option("--max-images", type=click.IntRange(min=1), metavar="N", help="Images of a pack [default: data.packing].")
@click.option(
    "--max-samples", type=click.IntRange(min=1), metavar="N", help="Samples of a pack [default: data.packing]."
)
@json_option
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    *,
    max_tokens: int | None,
    max_images: int | None,
    max_samples: int | None,
    as_json: bool,
) -> None:
    """Plan packs of a recipe's training samples: each sample once, in as few packs as can be found.

    Lengths are those that the target's tokenizer, the prompt and the source's visual tokens give. No image is
    decoded; headers are read where an image's tokens depend on its size.
    The plan is kept, and used again while nothing changes: training draws from it where the recipe has `data.packing`.
    """
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
    found = runs.data_pack(checked, max_tokens=max_tokens, max_images=max_images, max_samples=max_samples)
    if as_json:
        console.print_json(found)
        return
    pairs = {key: value for key, value in found.items() if key not in ("named", "stages")}
    shown = pairs | {"fill": f"{found['fill']:.2%}"}
    console.print_pairs(shown, title=f"{checked.name}: packs of {found['max_tokens']:,} tokens")
    for line in found["named"]:
        console.print_line(line)
    console.print_rows(found["stages"], title="an update holds, on average")
    console.print_line(
        "a stage's packs hold no more samples than its batch size, so they may be less full than those above"
    )
