"""`vpgtrans registry publish`: from a run to an entry that others can trust."""

from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, device_option, json_option, trust_option

KINDS = ("vlm", "vpg", "projector", "adapter")


@click.command(
    cls=Examples,
    short_help="Publish a run's result.",
    epilog="""
    vpgtrans registry publish runs/quickstart --to checkpoints/emoji-gemma --licence CC-BY-SA-4.0
    vpgtrans registry publish runs/quickstart --to s3://bucket/emoji-gemma/1.0.0 --index team/checkpoints_registry.yaml
    vpgtrans registry publish runs/quickstart --to oci:registry.example/eyes/emoji-gemma:1.0.0 --dry-run
    vpgtrans registry publish runs/quickstart --to hf:ORG/emoji-gemma --base-model google/gemma-3-270m
    vpgtrans registry publish runs/quickstart --kind adapter --id emoji-gemma-lora --to checkpoints/emoji-gemma-lora
    """,
)
@click.argument("run", metavar="RUN")
@click.option(
    "--to",
    required=True,
    metavar="PLACE",
    help="Where its files go: a directory, oci:HOST/REPO:TAG, hf:ORG/REPO, or a URL such as s3://BUCKET/PATH.",
)
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The index that names it, made if it isn't there [default: the first file of $VPGTRANS_REGISTRY, else "
    "./checkpoints_registry.yaml].",
)
@click.option("--id", "name", metavar="ID", help="Its name, in small letters [default: the recipe's name].")
@click.option("--version", default="1.0.0", show_default=True, metavar="VERSION", help="Numbers with dots between.")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="vlm",
    show_default=True,
    help="All of it, the VPG with its projector, or a projector or LoRA adapter alone.",
)
@click.option(
    "--licence",
    multiple=True,
    metavar="SPDX|NAME=SPDX",
    help="The files' licence, such as CC-BY-4.0 [default: that of all they were made from, where it is known and one]; "
    "or, by its name in the recipe, that of data or of a base. May be given several times.",
)
@click.option("--description", metavar="TEXT", help="A sentence on what it is [default: made from its parts].")
@click.option(
    "--measure",
    multiple=True,
    metavar="DATASET[:SPLIT]",
    help="Measure on this now [default: take what the run measured]. May be given several times.",
)
@click.option("--half", is_flag=True, help="Store connector and projector in bf16: half the size, nearly the same.")
@click.option("--base-model", metavar="ORG/REPO", help="The LLM on the hub, where the recipe names it otherwise.")
@click.option("--dry-run", is_flag=True, help="Check, load and compare everything, and write nothing.")
@device_option
@trust_option
@json_option
def command(run: str, *, name: str | None, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Check a run's result, write its files to a place and an entry for it into an index.

    RUN is a run or a VLM directory. What is written is loaded and its logits are compared with the run's before the
    index names it. An id with its version never changes: a better one has another --version.

    Tokens come from the environment, or from the log-in of the libraries (`aws configure`, `docker login`,
    `hf auth login`).
    """
    with console.loading():
        from vpgtrans import runs
    done = runs.publish(run, id=name, dry_run=dry_run, **options)
    entry = done.entry
    shown = {
        "name": entry.name,
        "kind": entry.kind,
        "location": entry.locations[0],
        "index": str(done.index),
        "files": len(entry.files),
        "bytes": entry.size,
        "licence": entry.licence.spdx,
        "logits": done.difference,
        "dry_run": dry_run,
    }
    if as_json:
        console.print_json(shown | {"entry": entry.model_dump(mode="json", exclude_none=True)})
        return
    title = f"{entry.name} would be published" if dry_run else f"published {entry.name}"
    shown |= {
        "bytes": f"{entry.size / 1e6:,.1f} MB",
        "logits": "the same as the run's"
        if not done.difference
        else f"off from the run's by at most {done.difference:.2g} standard deviations",
        "needs": entry.base.llm.reference,
    }
    console.print_pairs({key: value for key, value in shown.items() if key != "dry_run"}, title=title)
    if not dry_run and entry.kind in ("vlm", "vpg"):
        console.print_line(f"try it: vpgtrans caption registry:{entry.name} IMAGE")
