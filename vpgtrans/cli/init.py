"""`vpgtrans init`: a first recipe, from questions or options."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli.data_source import read_keys, source_options
from vpgtrans.cli.options import Examples

_LLM = ("lora", "qlora", "frozen", "full")
_EXAMPLES = {
    "vpg": "hf:Salesforce/blip2-opt-2.7b, runs/NAME, registry:NAME",
    "target": "hf:Qwen/Qwen3-0.6B, path/to/model, model.gguf",
    "train": "captions.parquet, hf:ORG/NAME, a folder, openmoji",
    "validation": "held-out.parquet, hf:ORG/NAME:validation, openmoji:validation",
}
"""What has to be said: an option's name -> what it may be."""


@click.command(
    cls=Examples,
    short_help="Write a first recipe, from questions or options.",
    epilog="""
    vpgtrans init
    vpgtrans init my.yaml --vpg hf:Salesforce/blip2-opt-2.7b --target hf:Qwen/Qwen3-8B --train a.csv --validation b.csv
    vpgtrans init ask.yaml --vpg runs/mine --target model.gguf --train openmoji --validation openmoji:validation --ask
    """,
)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default=Path("recipe.yaml"))
@click.option("--vpg", metavar="REF", help=f"The VLM whose eyes are taken: {_EXAMPLES['vpg']}.")
@click.option("--target", metavar="REF", help=f"The LLM that gets them: {_EXAMPLES['target']}.")
@click.option("--train", metavar="DATASET[:SPLIT]", help=f"What is learnt: {_EXAMPLES['train']}.")
@click.option("--validation", metavar="DATASET[:SPLIT]", help="What is measured on: data that is not learnt.")
@click.option("--samples", type=click.IntRange(min=128), metavar="N", help="Seen in all [default: 100,000].")
@click.option("--llm", type=click.Choice(_LLM), help="What the fine-tune does with the LLM [default: lora].")
@click.option("--pack", type=click.IntRange(min=1), metavar="TOKENS", help="Rows that samples share without padding.")
@click.option("--name", help="The run's [default: as the file].")
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@click.option("--no-schema", is_flag=True, help="Write and name no schema for editors.")
@click.option("--ask/--no-ask", default=None, help="Ask what no option says [default: on a terminal].")
@source_options
def command(file: Path, *, overwrite: bool, no_schema: bool, ask: bool | None, **options: Any) -> None:
    """Write a commented recipe to FILE [default: recipe.yaml], and beside it the schema that editors check it by.

    On a terminal it asks for what no option says. The options that name formats and columns hold for --train and
    --validation. What it writes is a beginning: the schema explains every key.
    """
    if file.exists() and not overwrite:
        raise click.UsageError(f"{file} is there already; --overwrite replaces it, or name another file.")
    keys = read_keys(options)
    said = _asked(options, keys) if (sys.stdin.isatty() if ask is None else ask) else options
    for name, examples in _EXAMPLES.items():
        if not said[name]:
            raise click.UsageError(f"--{name} is needed, such as {examples}.")

    from vpgtrans.recipe_draft import Draft, checked, draft_text, name_from
    from vpgtrans.recipe_schema import FILE, schema_text

    draft = Draft(
        name=said["name"] or name_from(file),
        source=said["vpg"],
        target=said["target"],
        train=[_source(said["train"], keys)],
        validation=[_source(said["validation"], keys)],
        samples=said["samples"] or Draft.samples,
        tune=said["llm"] or Draft.tune,
        pack=said["pack"],
    )
    text = draft_text(draft, file, schema=not no_schema)
    checked(text, file)
    _write(file, text)
    click.echo(f"recipe: {file}")
    if not no_schema:
        _write(file.with_name(FILE), schema_text())
        click.echo(f"schema for editors: {file.with_name(FILE)}")
    click.echo(f"next: vpgtrans validate {file}")


def _source(name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """`DATASET[:SPLIT]` as a recipe has it."""
    from vpgtrans.data.config import named_split

    dataset, split = named_split(name)
    return {"dataset": dataset, **keys} | ({} if split is None else {"split": split})


def _asked(options: Mapping[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """The options, with answers in the place of those that were not given."""
    said = dict(options)

    def ask(name: str, question: str, **more: Any) -> None:
        if said[name] is None:
            said[name] = click.prompt(question, err=True, **more) or None

    ask("vpg", f"The VLM whose eyes are taken ({_EXAMPLES['vpg']})")
    ask("target", f"The LLM that gets them ({_EXAMPLES['target']})")
    ask("train", f"Training data ({_EXAMPLES['train']})")
    ask("validation", f"Validation data ({_EXAMPLES['validation']})")
    named = {"caption", "question", "conversation", "document", "text", "format"} & set(keys)
    if not named and not said["train"].startswith("openmoji"):
        keys["image"] = click.prompt("Its column of images", default=keys.get("image", "image"), err=True)
        keys["caption"] = click.prompt("Its column of captions", default="caption", err=True)
    ask("samples", "Samples to train on", default=100_000, type=click.IntRange(min=128))
    ask("llm", "The LLM in the fine-tune", default="lora", type=click.Choice(_LLM))
    return said


def _write(file: Path, text: str) -> None:
    from vpgtrans.errors import OutputError
    from vpgtrans.files import appearing

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with appearing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: can't be written: {error.strerror or error}") from error
