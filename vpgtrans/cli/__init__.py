"""The command line: one thin module a verb, imported when the verb is called. `--help` loads no torch."""

from vpgtrans.cli.root import cli, main

__all__ = ["cli", "main"]
