"""`vpgtrans plan`: memory, time and cost before you rent anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option, read_recipe, recipe_arguments
from vpgtrans.gpus import GPUS, parse_gpus

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
    wanted = _wanted(gpus, sweep, nodes=nodes)
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
    found = runs.plan(checked, wanted, nodes=nodes, price=price, text_tokens=text_tokens)
    if as_json:
        console.print_json(found)
        return
    for stage in checked.stages:
        own = [row for row in found if row["stage"] == stage.name]
        console.print_rows([_shown(row) for row in own], title=f"{stage.name}: {own[0]['lengths']}")
        for note in dict.fromkeys(row["note"] for row in own if row["note"]):
            ways = [f"{row['gpus']} {row['strategy']}" for row in own if row["note"] == note]
            more = f" and {len(ways) - _NAMED} more" if len(ways) > _NAMED else ""
            console.print_line(f"{', '.join(ways[:_NAMED])}{more}: {note}")
    for line in _totals(found):
        console.print_line(line)


_NAMED = 4
"""GPUs and strategies that a note names."""


def _wanted(gpus: str | None, sweep: str | None, *, nodes: int) -> list[str]:
    """What to plan for, each once; UserError for what is unknown, before any library is loaded."""
    rented = [parse_gpus(gpus, nodes=nodes)] if gpus is not None else []
    if sweep is not None:
        count = rented[0].count if rented else 1
        names = list(GPUS) if sweep == _ALL else [name.strip() for name in sweep.split(",")]
        rented += [parse_gpus(f"{count}x{name}", nodes=nodes) for name in names]
    return list(dict.fromkeys(f"{each.count}x{each.name}" for each in rented))


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table: memory in GB, and the cheapest marked."""
    from vpgtrans.progress import duration

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
        "time": duration(row["hours"] * 3600),
        "USD": None if row["cost"] is None else f"{row['cost']:,.2f}",
    }


def _totals(rows: list[dict[str, Any]]) -> list[str]:
    """What all stages take together on the same GPUs under the same strategy, as a run trains them."""
    from vpgtrans.progress import duration

    ways: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        ways.setdefault((row["gpus"], row["strategy"]), []).append(row)
    whole = {way: of for way, of in ways.items() if all(row["fits"] for row in of)}
    if not whole:
        return ["nothing fits every stage: see `largest`, trainer.gradient_checkpointing, target.quantise, LoRA"]

    def bill(way: tuple[str, str]) -> tuple[float, float]:
        of = whole[way]
        return sum(row["cost"] or 0.0 for row in of), sum(row["hours"] for row in of)

    priced = [way for way in whole if whole[way][0]["cost"] is not None]
    best = min(priced or whole, key=bill)
    spent, hours = bill(best)
    said = f"{' '.join(best)}: {duration(hours * 3600)}"
    if not priced:
        return [f"all stages on {said}"]
    gpu_hours = sum(row["gpu_hours"] for row in whole[best])
    return [f"cheapest that fits every stage, {said}, {gpu_hours:,.2f} GPU-hours, {spent:,.2f} USD"]
