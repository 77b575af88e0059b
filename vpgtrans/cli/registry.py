"""`vpgtrans registry`: find, check, get and publish checkpoints."""

import click

from vpgtrans.cli.lazy import LazyGroup

VERBS = {
    "list": "vpgtrans.cli.registry_list",
    "show": "vpgtrans.cli.registry_show",
    "pull": "vpgtrans.cli.registry_pull",
    "verify": "vpgtrans.cli.registry_verify",
    "diff": "vpgtrans.cli.registry_diff",
    "publish": "vpgtrans.cli.registry_publish",
    "yank": "vpgtrans.cli.registry_yank",
}
"""Verb -> the module that holds its `command`, in the order of the help page."""


@click.group(name="registry", cls=LazyGroup, verbs=VERBS, short_help="Find, check, get and publish checkpoints.")
def command() -> None:
    """Find, check, get and publish checkpoints: VPGs, projectors, adapters and whole VLMs.

    An index (checkpoints_registry.yaml) says what each one is, where it lies and the hash of every file.
    """
