"""Calling the command line within this process. Not a test file."""

from pathlib import Path

from click.testing import CliRunner, Result

from vpgtrans.cli.root import cli


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="vpgtrans")
