"""`vpgtrans compare`: what did the transfer save?"""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import (
    Examples,
    check_output,
    device_option,
    json_option,
    output_options,
    read_recipe,
    recipe_arguments,
)


@click.command(
    cls=Examples,
    short_help="What does a transfer save? Several starts, side by side.",
    epilog="""
    vpgtrans compare recipes/compare.yaml
    vpgtrans compare recipes/compare.yaml --arms scratch,transfer --seeds 1 --output runs/short
    vpgtrans compare recipes/compare.yaml --resume --json > comparison.json
    vpgtrans compare recipes/compare.yaml --resume --seeds 5
    """,
)
@recipe_arguments
@output_options
@click.option("--arms", metavar="A,B,...", help="Starts to compare: scratch, inherit, transfer, or an initialiser.")
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="Number of seeds, from the recipe's seed on.")
@device_option
@json_option
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    *,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    arms: str | None,
    seeds: int | None,
    device: str,
    as_json: bool,
) -> None:
    """Train the same target with the same data and budget from several starts, side by side.

    The speed-up of an arm is the number of samples that scratch needed for its best validation loss, divided by the
    number (warm-up included) after which the arm first reached it.
    """
    check_output(resume=resume, overwrite=overwrite)
    # through the recipe, so that a wrong arm gets the same message wherever it is written
    more = [f"compare.arms=[{arms}]"] if arms is not None else []
    more += [f"compare.seeds={seeds}"] if seeds is not None else []
    checked = read_recipe(recipe, [*overrides, *more])
    with console.loading():
        from vpgtrans import runs
    result = runs.compare(
        checked,
        arms=list(checked.compare.arms),
        seeds=checked.compare.seeds,
        output=output,
        resume=resume,
        overwrite=overwrite,
        device=device,
    )
    if as_json:
        console.print_json(result)
        return
    console.print_rows(rows(result), title=f"{checked.name}: validation loss and speed-up over scratch")
    console.print_pairs(result["definitions"], title="what the arms are")
    for name in ("report.html", "curves.png"):
        path = (output or Path("runs") / checked.name) / name
        if path.exists():
            click.echo(f"{path.stem}: {path}")


def rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A comparison's summary as a row an arm; a speed-up of null means scratch's best was never reached."""
    table = []
    for name, arm in summary["arms"].items():
        losses = [loss for loss in arm["val_loss"] if loss is not None]
        speedup = summary.get("speedup", {}).get(name) or {}
        over_inherit = summary.get("speedup_over_inherit", {}).get(name) or {}
        table.append(
            {
                "arm": name,
                "val_loss (median)": median(losses) if losses else None,
                "per seed": losses,
                "speed-up (median)": speedup.get("median"),
                "min": speedup.get("min"),
                "max": speedup.get("max"),
                "over inherit": over_inherit.get("median"),
            }
        )
    return table
