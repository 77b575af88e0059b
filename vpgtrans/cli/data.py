"""`vpgtrans data`: look at, plan and prepare data."""

import click

from vpgtrans.cli.lazy import LazyGroup

VERBS = {
    "stats": "vpgtrans.cli.data_stats",
    "pack": "vpgtrans.cli.data_pack",
    "convert": "vpgtrans.cli.data_convert",
    "filter": "vpgtrans.cli.data_filter",
}
"""Verb -> the module that holds its `command`, in the order of the help page."""


@click.group(name="data", cls=LazyGroup, verbs=VERBS, short_help="Look at data and prepare it.")
def command() -> None:
    """Look at a recipe's data as its target LLM sees it, convert data sets, filter them."""
