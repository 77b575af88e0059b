"""The `vpgtrans` group: lazy verbs, exit codes, one message an error.

Exit codes: 0 done; 1 failed while running; 2 the user's input is wrong; 4 integrity; 130 interrupted; 143 terminated.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from vpgtrans import __version__
from vpgtrans.cli.lazy import LazyGroup
from vpgtrans.errors import VpgTransError
from vpgtrans.processes import first_process

VERBS = {
    "transfer": "vpgtrans.cli.transfer",
    "train": "vpgtrans.cli.train",
    "compare": "vpgtrans.cli.compare",
    "probe": "vpgtrans.cli.probe",
    "init": "vpgtrans.cli.init",
    "validate": "vpgtrans.cli.validate",
    "plan": "vpgtrans.cli.plan",
    "evaluate": "vpgtrans.cli.evaluate",
    "caption": "vpgtrans.cli.caption",
    "data": "vpgtrans.cli.data",
    "registry": "vpgtrans.cli.registry",
    "watch": "vpgtrans.cli.watch",
    "doctor": "vpgtrans.cli.doctor",
    "schema": "vpgtrans.cli.schema",
    "completion": "vpgtrans.cli.completion",
}
"""Verb -> the module that holds its `command`, in the order of the help page."""


class Root(LazyGroup):
    """Turns errors into exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except VpgTransError as error:
            if os.environ.get("VPGTRANS_DEBUG") == "1":
                raise
            if error.of_all and not first_process():
                ctx.exit(0)  # anything else would make Lightning kill the first process at its report
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except _Terminated as ended:
            click.echo("terminated", err=True)
            ctx.exit(int(str(ended)))
        except BrokenPipeError:
            # the reader of our output went away: nothing left to say, and nothing to flush at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)


@click.group(
    cls=Root,
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Run `vpgtrans COMMAND --help` for examples. VPGTRANS_DEBUG=1 shows tracebacks.",
)
@click.version_option(__version__, prog_name="vpgtrans")
@click.option("-v", "--verbose", is_flag=True, help="Log more, the libraries' own messages included.")
@click.option("-q", "--quiet", is_flag=True, help="Log warnings and errors only.")
@click.pass_context
def cli(ctx: click.Context, *, verbose: bool, quiet: bool) -> None:
    """Give a language model the eyes that another one was trained with."""
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet exclude each other.")
    ctx.obj = "verbose" if verbose else "quiet" if quiet else "normal"


class _Terminated(SystemExit):
    """SIGTERM came while no stage was training, which would have saved a checkpoint."""


def _terminated(signum: int, frame: FrameType | None) -> NoReturn:
    """Unwind the stack."""
    raise _Terminated(128 + signum)


def _nothing_to_save(signum: int, frame: FrameType | None) -> None:
    """A run under way takes this signal for itself; to any other command it must not be the end."""
    click.echo("SIGUSR1: no stage is training, so there is no checkpoint to write", err=True)


def main() -> None:
    """The entry point of the `vpgtrans` script."""
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGUSR1, _nothing_to_save)
    cli(prog_name="vpgtrans")
