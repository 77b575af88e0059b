"""`vpgtrans watch`: a run, seen from another terminal."""

from dataclasses import asdict
from pathlib import Path

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import Examples, json_option


@click.command(
    cls=Examples,
    short_help="Show how a run goes, from another terminal.",
    epilog="""
    vpgtrans watch runs/quickstart
    vpgtrans watch runs/quickstart --once
    vpgtrans watch runs/quickstart --json | jq .left
    """,
)
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--once", is_flag=True, help="Show it as it is now, and stop.")
@click.option("--every", type=click.FloatRange(min=0.1), default=2.0, show_default=True, help="Seconds between looks.")
@json_option
def command(run: Path, *, once: bool, every: float, as_json: bool) -> None:
    """Show a run's stages, losses, pace and time left, whether it is alive, and its last checkpoint.

    It reads the run's directory and changes nothing; Ctrl-C ends the watching, not the run. It follows until the run
    ends; --once and --json look once.
    """
    from vpgtrans.following import view

    if as_json:
        console.print_json(asdict(view(run)))
        return
    from vpgtrans.progress import follow

    follow(lambda: view(run), every=every, once=once)
