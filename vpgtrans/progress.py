"""What a run shows while it works: rich's progress bars on stderr, gone when it is no terminal; a stage's table."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vpgtrans.processes import first_process

T = TypeVar("T")


def bar() -> Progress:
    """A progress display to be used as a context manager."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal or not first_process(),
        transient=True,
    )


def track(items: Iterable[T], title: str, *, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar; `total` where the items don't know their number."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar() as progress:
        task = progress.add_task(title, total=total, note="")
        for item in items:
            yield item
            progress.advance(task)


def trainable_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What trains in a stage, as lines for the log.

    rows: a part each, with stage, part, mode, parameters, trained and lr, as `training.parts.table` gives them.
    """
    table = Table(title=f"stage {rows[0]['stage']}", title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("part", "mode"):
        table.add_column(name)
    for name in ("parameters", "of them train", "learning rate"):
        table.add_column(name, justify="right")
    for row in rows:
        rate = "" if row["lr"] is None else f"{row['lr']:g}"
        table.add_row(row["part"], row["mode"], f"{row['parameters']:,}", f"{row['trained']:,}", rate)
    return _lines(table)


def data_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each source of a mixture yields, as lines for the log; rows as `data.stats.outlook` gives them."""
    measured = max((row["measured"] for row in rows), default=0)
    title = f"training data (tokens and images: means over up to {measured:,} rows of a source)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("source", overflow="fold")
    for name in ("rows", "draws", "tokens", "learnt", "images", "share of tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        means = (f"{row[name]:,.1f}" for name in ("tokens", "learnt", "images"))
        table.add_row(row["source"], f"{row['rows']:,}", f"{row['draws']:.1%}", *means, f"{row['share_of_tokens']:.1%}")
    return _lines(table)


def _lines(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines() if line.strip())
