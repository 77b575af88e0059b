"""`vpgtrans plan`: memory, time and cost before you rent anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option, read_recipe, recipe_arguments

_ALL = "all"


@click.command(
    cls=Examples,
    short_help="Say what a recipe takes, before you rent anything.",
    epilog="""
    vpgtrans plan recipes/blip2-opt-2.7b-to-llama-3.2-3b.yaml --gpus 1xA100-40GB
    vpgtrans plan my.yaml stages.finetune.micro_batch_size=8 --gpus 8xA100-80GB --price 1.10
    vpgtrans plan my.yaml --gpus 4xL40S --sweep L4,A100-40GB,H100-80GB --text-tokens 60
    vpgtrans plan recipes/quickstart.yaml --gpus cpu --json
    """,
)
@recipe_arguments
@click.option("--gpus", metavar="N×TYPE", help="GPUs of one machine, such as 8xA100-40GB; or cpu: this machine.")
@click.option(
    "--sweep",
    is_flag=False,
    flag_value=_ALL,
    metavar="[TYPES]",
    help="Compare GPU types, separated by commas (all that are known, if none is named); --gpus says how many.",
)
@click.option("--nodes", type=click.IntRange(min=1), default=1, metavar="N", help="Machines with as many GPUs each.")
@click.option(
    "--price", type=click.FloatRange(min=0), metavar="USD", help="Of one GPU an hour [default: a typical one]."
)
@click.option(
    "--text-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of an answer [default: what the data has, if it is at hand; else 32].",
)
@json_option
def command(
    recipe: Path,
    overrides: tuple[str, ...],
    *,
    gpus: str | None,
    sweep: str | None,
    nodes: int,
    price: float | None,
    text_tokens: int | None,
    as_json: bool,
) -> None:
    """Memory of a GPU by part, the largest micro-batch that fits, time and cost of every stage under each strategy.

    From configs alone: no weights are read. Of models on the hub configs and tokenizers are downloaded.
    """
    if gpus is None and sweep is None:
        raise click.UsageError("--gpus N×TYPE says what to plan for, such as --gpus 8xA100-40GB.")
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
        from vpgtrans.gpus import GPUS
        from vpgtrans.runs.plan import parse_gpus
    wanted = [gpus] if gpus is not None else []
    if sweep is not None:
        count = parse_gpus(gpus).count if gpus is not None else 1
        wanted += [f"{count}x{name.strip()}" for name in (list(GPUS) if sweep == _ALL else sweep.split(","))]
    found = runs.plan(checked, list(dict.fromkeys(wanted)), nodes=nodes, price=price, text_tokens=text_tokens)
    if as_json:
        console.print_json(found)
        return
    for stage in checked.stages:
        own = [row for row in found if row["stage"] == stage.name]
        console.print_rows([_shown(row) for row in own], title=f"{stage.name}: {own[0]['lengths']}")
        for row in own:
            if row["note"] and row["fits"]:
                console.print_line(f"{row['gpus']}, {row['strategy']}: {row['note']}")
    for line in _totals(found):
        console.print_line(line)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: memory in GB, and the cheapest marked."""
    parts = {
        name: f"{row['memory_bytes'].get(name, 0) / 1e9:.2f}"
        for name in ("weights", "gradients", "optimizer", "activations", "logits")
    }
    rest = row["total_bytes"] - sum(row["memory_bytes"].get(name, 0) for name in parts)
    return {
        "": "*" if row["cheapest"] else "",
        "gpus": row["gpus"],
        "strategy": row["strategy"],
        "fits": row["fits"],
        **parts,
        "other": f"{rest / 1e9:.2f}",
        "GB of": f"{row['total_bytes'] / 1e9:.1f} of {row['device_bytes'] / 1e9:.1f}",
        **({"pack": row["pack_tokens"]} if "pack_tokens" in row else {"micro-batch": row["micro_batch"]}),
        "largest": row["largest"],
        "samples/s": row["samples_per_second"],
        "tokens/s": row["tokens_per_second"],
        "hours": row["hours"],
        "USD": row["cost"],
    }


def _totals(rows: list[dict[str, Any]]) -> list[str]:
    """What all stages take together where each has what is cheapest for it."""
    best = [row for row in rows if row["cheapest"]]
    if len(best) < len({row["stage"] for row in rows}):
        return ["no strategy fits every stage: see `largest`, trainer.gradient_checkpointing, target.quantise, LoRA"]
    hours, spent = sum(row["gpu_hours"] for row in best), sum(row["cost"] for row in best)
    return [f"* cheapest that fits: {hours:,.1f} GPU-hours, {spent:,.2f} USD in all"]
