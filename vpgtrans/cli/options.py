"""Arguments and options that several verbs share."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from vpgtrans.recipe import Recipe

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Examples(click.Command):
    """A command whose epilog keeps its lines: examples to copy."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")


def recipe_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """`RECIPE [KEY=VALUE ...]`."""
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")(function)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where a run goes, and what may happen to one that is there already."""
    function = click.option("--overwrite", is_flag=True, help="Replace the run that stands in the output directory.")(
        function
    )
    function = click.option("--resume", is_flag=True, help="Go on with the run in the output directory.")(function)
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Run directory [default: runs/NAME]."
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`: one JSON document on stdout and nothing else."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")(function)


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--device`."""
    return click.option(
        "--device",
        callback=_known_device,
        default="auto",
        show_default=True,
        metavar="DEVICE",
        help="Where it runs: auto, cpu, cuda, cuda:N or mps.",
    )(function)


def index_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--index`: one registry in place of all that are configured."""
    return click.option(
        "--index",
        metavar="FILE|URL",
        help="The one index to look into [default: those of $VPGTRANS_REGISTRY, then ./checkpoints_registry.yaml, "
        "then the package's].",
    )(function)


def trust_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--trust-remote-code`."""
    return click.option(
        "--trust-remote-code", is_flag=True, help="Run the code that the LLM's checkpoint brings along."
    )(function)


def parts_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--projector` and `--adapter`: others in place of a VLM's own."""
    for part in ("adapter", "projector"):
        function = click.option(
            f"--{part}", metavar="REF", help=f"Use this {part} in place of the VLM's own, such as registry:NAME."
        )(function)
    return function


def force_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--force`."""
    return click.option(
        "--force", is_flag=True, help="Go on with an LLM that is not the one the checkpoint was made with."
    )(function)


def _known_device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    """Whether it is there is found out with torch; a word that can't be one is refused at once."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value):
        raise click.BadParameter(f"{value} is unknown; right would be auto, cpu, cuda, cuda:N or mps")
    return value


def check_output(*, resume: bool, overwrite: bool) -> None:
    """Refuse two options that contradict each other."""
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other: go on with the run, or replace it.")


def read_recipe(path: Path, overrides: Sequence[str]) -> "Recipe":
    """The checked recipe; imports pydantic, but no torch."""
    from vpgtrans.recipe import load_recipe

    return load_recipe(path, overrides)
