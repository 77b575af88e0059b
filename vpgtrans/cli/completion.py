"""`vpgtrans completion`: what a shell needs to complete commands, options and files."""

import click
from click.shell_completion import get_completion_class

from vpgtrans.cli.options import Examples


@click.command(
    cls=Examples,
    short_help="Print a shell's completion script.",
    epilog="""
    echo 'eval "$(vpgtrans completion bash)"' >> ~/.bashrc
    echo 'eval "$(vpgtrans completion zsh)"' >> ~/.zshrc
    vpgtrans completion fish > ~/.config/fish/completions/vpgtrans.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, *, shell: str) -> None:
    """Print the script that has a shell complete commands, options, their values and files.

    It takes hold in the next shell. Bash has to be 4.4 or newer.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    root = ctx.find_root()
    click.echo(kind(root.command, {}, "vpgtrans", "_VPGTRANS_COMPLETE").source())
