"""`vpgtrans data convert`: any data set as shards."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.data_source import read_source, source_options
from vpgtrans.cli.options import Examples, json_option


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """`256MB`, `1GB`, `500000` as bytes."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+)\s*([kMG]?)i?B?", value.strip(), flags=re.IGNORECASE)
    if not found or not int(found[1]):
        raise click.BadParameter(f"{value} is no size; right would be 256MB or 1GB")
    return int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2].lower()]


@click.command(
    cls=Examples,
    short_help="Write a data set as sharded parquet or WebDataset.",
    epilog="""
    vpgtrans data convert llava.json shards --format llava --folder images --to parquet
    vpgtrans data convert captions.tsv shards --image path --caption text --to webdataset --rows-per-shard 10000
    vpgtrans data convert hf:ORG/NAME shards --split train --to parquet --shard-size 1GB
    vpgtrans data convert photos shards --source '{format: folder, filter: scores.parquet}' --to parquet
    """,
)
@click.argument("dataset", metavar="DATASET")
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["parquet", "webdataset"]), required=True, help="What to write.")
@click.option("--rows-per-shard", type=click.IntRange(min=1), metavar="N", help="A shard ends after N rows.")
@click.option("--shard-size", callback=_bytes, metavar="SIZE", help="A shard ends at this size [default: 512MB].")
@click.option(
    "--images",
    type=click.Choice(["auto", "one", "list"]),
    default="auto",
    show_default=True,
    help="A column with one image a row, or with lists; auto: as in the first row.",
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Decode every image to see if it can be.")
@source_options
@json_option
def command(
    dataset: str,
    output: Path,
    *,
    to: Any,
    rows_per_shard: int | None,
    shard_size: int | None,
    images: str,
    verify: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a data set's samples into the directory OUTPUT as shards, with a manifest of their checksums.

    DATASET is what a recipe's `dataset` may be. Rows that can't be read go to OUTPUT/quarantine.jsonl. The same command
    again goes on where it was stopped, and writes damaged shards anew.
    """
    source = read_source(dataset, options)
    with console.loading():
        from vpgtrans.data.convert import SHARD_BYTES, convert
    done = convert(
        source,
        output,
        to=to,
        rows_per_shard=rows_per_shard,
        shard_bytes=shard_size or SHARD_BYTES,
        images=images,
        verify=verify,
    )
    if as_json:
        console.print_json(asdict(done))
        return
    console.print_pairs({key: value for key, value in asdict(done).items() if key != "source"})
    said = ", ".join(f"{key}: {_yaml(value)}" for key, value in done.source.items())
    click.echo(f"in a recipe:\n\ndata:\n  train:\n    - {{{said}}}")


def _yaml(value: str) -> str:
    """A text as YAML, quoted where it must be."""
    import json

    return value if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) else json.dumps(value, ensure_ascii=False)
