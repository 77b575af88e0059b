"""`vpgtrans data filter`: score a data set, and say which rows to keep."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.data_source import read_source, source_options
from vpgtrans.cli.options import Examples, device_option, json_option, trust_option


@click.command(
    cls=Examples,
    short_help="Score a data set's samples and choose which to keep.",
    epilog="""
    vpgtrans data filter a.parquet --scores s.parquet --scorer vlm-gap --vlm runs/quickstart --keep-fraction 0.9
    vpgtrans data filter a.parquet --scores s.parquet --scorer clip --clip path/to/clip --threshold 0.25
    vpgtrans data filter a.parquet --scores s.parquet --scorer length --words 3:60 --scorer duplicate
    vpgtrans data filter a.parquet --scores s.parquet --scorer column:dfn.parquet:score --keep-fraction 0.3
    vpgtrans data filter openmoji --scores s.parquet --scorer vlm-gap --scorer vlm-loss --vlm runs/quickstart --union
    """,
)
@click.argument("dataset", metavar="DATASET")
@click.option(
    "--scores",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE.parquet",
    help="What is written: scores and `keep`. What it holds already is not scored again.",
)
@click.option(
    "--scorer",
    "scorers",
    multiple=True,
    required=True,
    metavar="SCORER",
    help="vlm-gap, vlm-blind-gap, vlm-rank, vlm-loss, clip, length, duplicate, duplicate-text, duplicate-image, or "
    "column:FILE.parquet:COLUMN[:low]. May be given several times.",
)
@click.option(
    "--keep-fraction", type=click.FloatRange(0, 1), metavar="F", help="Keep this share, the best, by every score."
)
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="[SCORER=]T",
    help="Keep what is at least as good. May be given several times.",
)
@click.option("--union", is_flag=True, help="Keep what any score keeps [default: what all keep].")
@click.option("--words", metavar="MIN:MAX", help="length: keep texts of as many words.")
@click.option("--vlm", metavar="VLM", help="vlm-…: a VLM directory, a run, or registry:NAME.")
@click.option("--clip", metavar="MODEL", help="clip: a directory or hf:ORG/NAME.")
@click.option(
    "--others", type=click.IntRange(min=1), default=8, show_default=True, help="vlm-gap, vlm-rank: other images."
)
@click.option("--seed", type=int, default=0, show_default=True, help="vlm-gap, vlm-rank: of their choice.")
@source_options
@device_option
@trust_option
@json_option
def command(
    dataset: str, *, scores: Path, union: bool, device: str, trust_remote_code: bool, as_json: bool, **options: Any
) -> None:
    """Score every sample of DATASET and write the scores, and which rows to keep, to a parquet file.

    The data set stays as it is: `filter: FILE.parquet` in a recipe's data source leaves the other rows out. vlm-gap
    says whether a text is about its image: how much likelier it is with it than with other ones. The rules length and
    duplicate hold besides --union. The same command again goes on where it was stopped.
    """
    source = read_source(dataset, options)
    with console.loading():
        from vpgtrans.data.filter.build import plan
        from vpgtrans.data.filter.run import filter_data
        from vpgtrans.runs.parts import open_vlm, pick_device
    opener = partial(open_vlm, device=device, trust_remote_code=trust_remote_code)
    scorers, rules = plan(**options, open_vlm=opener, device=pick_device(device))
    done = filter_data(source, scores, scorers, rules=rules, union=union)
    if as_json:
        console.print_json(asdict(done))
        return
    console.print_pairs(asdict(done))
    click.echo(f"in a recipe's data source:\n\n    filter: {scores}")
