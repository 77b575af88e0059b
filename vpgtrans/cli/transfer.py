"""`vpgtrans transfer`: the main job."""

from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import training
from vpgtrans.cli.options import Examples


@click.command(
    cls=Examples,
    short_help="Move a VPG to another LLM: the main job.",
    epilog="""
    vpgtrans transfer recipes/quickstart.yaml
    vpgtrans transfer recipes/quickstart.yaml seed=1 stages.warmup.budget.samples=2000
    vpgtrans transfer recipes/quickstart.yaml target.llm=hf:Qwen/Qwen3-0.6B --output runs/qwen
    vpgtrans transfer recipes/quickstart.yaml target.llm=hf:Qwen/Qwen3-0.6B --output runs/qwen --resume
    """,
)
@training.training_options
@click.option("--force", is_flag=True, help="source.force=true: go on where the source's LLM is not quite its own.")
def command(recipe: Path, overrides: tuple[str, ...], *, force: bool, **options: Any) -> None:
    """Move a VPG to the target LLM: convert its projector, warm it up, fine-tune, evaluate, report.

    KEY=VALUE overrides a key of the recipe: keys are dotted, list items are named by number (or a stage by its
    name), values are YAML.
    """
    training.run("transfer", recipe, (*overrides, *(["source.force=true"] if force else [])), **options)
