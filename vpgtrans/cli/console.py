"""What the CLI shows: logs and progress on stderr, results on stdout."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import click

from vpgtrans.libraries import quieten
from vpgtrans.processes import first_process

HANDLER = "vpgtrans-cli"
"""Name of the one log handler that a command sets up."""
Level = Literal["verbose", "normal", "quiet"]
LEVELS = {"verbose": logging.DEBUG, "normal": logging.INFO, "quiet": logging.WARNING}


def _log_to_stderr(level: Level) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    logger = logging.getLogger("vpgtrans")
    # of several processes that train together the first one speaks for all
    logger.setLevel(LEVELS[level] if first_process() or level == "verbose" else logging.WARNING)
    for old in [handler for handler in logger.handlers if handler.get_name() == HANDLER]:
        logger.removeHandler(old)
    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_time=False, show_level=level == "verbose", markup=False
        )
    else:  # a file wants whole lines, neither folded nor filled with blanks
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s" if level == "verbose" else "%(message)s"))
    handler.set_name(HANDLER)
    logger.addHandler(handler)


@contextmanager
def loading(what: str = "loading libraries") -> Iterator[None]:
    """Set up logs and quieten libraries, then show a status while the heavy imports go on (on a terminal only)."""
    level: Level = click.get_current_context().find_root().obj or "normal"
    if level != "verbose":
        quieten()
    _log_to_stderr(level)
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and level != "quiet":
        with console.status(f"{what} …"):
            yield
    else:
        yield
    if level != "verbose":
        quieten()


def print_json(document: Any) -> None:
    """One JSON document on stdout; what is not finite becomes null, since JSON has no NaN."""
    click.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or "–"
    return str(value)


def _render(table: Any) -> None:
    from rich.console import Console

    # where there is no terminal, as wide as the table needs, so that a redirected one is not folded at 80 columns
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        Console(soft_wrap=False).print(table)
        return
    wide = Console(width=200)
    Console(width=min(200, max(80, wide.measure(table).maximum))).print(table)


def print_rows(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """A table with a column for each key that any row has."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in columns:
        numeric = any(isinstance(row.get(name), int | float) for row in rows)
        table.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        # Text, not markup: a caption may hold square brackets
        table.add_row(*(Text(cell(row.get(name))) for name in columns))
    _render(table)


def print_pairs(pairs: Mapping[str, Any], *, title: str | None = None) -> None:
    """A mapping as two columns; a list of mappings inside it becomes a table of its own."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    nested = {key: value for key, value in pairs.items() if _is_rows(value)}
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in pairs.items():
        if key not in nested:
            table.add_row(key.replace("_", " "), Text(cell(value)))
    _render(table)
    for key, rows in nested.items():
        print_rows(rows, title=key.replace("_", " "))


Branch = tuple[str, Sequence["Branch"]]
"""A line, and what hangs on it."""


def print_tree(root: Branch) -> None:
    """Lines that hang on others."""
    from rich.text import Text
    from rich.tree import Tree

    def grow(tree: Tree, branches: Sequence[Branch]) -> Tree:
        for line, below in branches:
            grow(tree.add(Text(line)), below)
        return tree

    _render(grow(Tree(Text(root[0])), root[1]))


def print_markdown(text: str) -> None:
    """Markdown by anybody: a link shows where it leads, and no control character reaches the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    printable = "".join(character for character in text if character == "\n" or character.isprintable())
    # prose has no width of its own, so a redirected one gets a page's
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    Console(width=width).print(Markdown(printable, hyperlinks=False))


def print_line(text: str) -> None:
    """A line of plain words on stdout."""
    click.echo(text)


def print_histogram(bars: Sequence[Mapping[str, Any]], *, title: str, width: int = 40) -> None:
    """Bars of text, one a line: `from`, `to` (inclusive) and `share` each."""
    if not bars:
        return
    largest = max(bar["share"] for bar in bars)
    rows = []
    for bar in bars:
        name = f"{bar['from']:,}" if bar["from"] == bar["to"] else f"{bar['from']:,}–{bar['to']:,}"
        # eighths of a character; what is there at all shows as one
        eighths = max(bool(bar["share"]), round(8 * width * bar["share"] / largest))
        rows.append((name, "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), f"{bar['share']:.1%}"))
    names, longest = max(len(name) for name, *_ in rows), max(len(drawn) for _, drawn, _ in rows)
    click.echo(f"\n{title}")
    for name, drawn, share in rows:
        click.echo(f"{name:>{names}}  {drawn:<{longest}}  {share:>6}")


def print_pieces(pieces: Sequence[Mapping[str, Any]]) -> None:
    """A sample as the LLM sees it. What the loss counts stands in 【 】 and, on a terminal, out in colour."""
    for piece in pieces:
        if piece["learnt"]:
            click.secho(f"【{piece['text']}】", nl=False, fg="green", bold=True)
        else:
            click.secho(piece["text"], nl=False, dim=piece["visual"] or None)
    click.echo()


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
