"""`vpgtrans train`: a VPG from scratch."""

from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import training
from vpgtrans.cli.options import Examples


@click.command(
    cls=Examples,
    short_help="Train a VPG from scratch with an LLM.",
    epilog="""
    vpgtrans train recipes/openmoji-source.yaml
    vpgtrans train recipes/openmoji-source.yaml target.llm=hf:Qwen/Qwen3-0.6B --output runs/source-qwen
    vpgtrans train recipes/openmoji-source.yaml --resume
    """,
)
@training.training_options
def command(recipe: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Train a VPG from scratch with an LLM: the same stages as a transfer, another start.

    KEY=VALUE overrides a key of the recipe: keys are dotted, list items are named by number (or a stage by its
    name), values are YAML.
    """
    training.run("train", recipe, overrides, **options)
