"""What a run shows while it works: rich's progress bars on stderr, gone when it is no terminal; a stage's table."""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vpgtrans.following import RunView, StageView, curve
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


@contextmanager
def transfer(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar for bytes that come; the function that is given takes how many have."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(escape(title), total=total)
        yield lambda count: progress.update(task, completed=count)


# --- a run under way ----------------------------------------------------------------------------

_STYLES = {
    "running": "bold green", "evaluating": "bold green", "finished": "bold green", "stalled": "bold yellow",
    "interrupted": "bold yellow", "failed": "bold red", "killed": "bold red",
}  # fmt: skip
_BLOCKS = "▁▂▃▄▅▆▇█"
_FIGURES = (
    ("loss", "loss", lambda value: f"{value:.3f}"),
    ("lr", "lr", lambda value: f"{value:.2g}"),
    ("grad_norm", "gradient", lambda value: f"{value:.3g}"),
    ("samples_per_second", "samples/s", lambda value: f"{value:,.1f}"),
    ("tokens_per_second", "tokens/s", lambda value: f"{value:,.0f}"),
    ("mfu", "MFU", lambda value: f"{value:.0%}"),
    ("memory_bytes", "memory", lambda value: f"{value / 2**30:.1f} GiB"),
)
"""Key of a line of the log, what it is called, and how it is shown."""


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sparkline(values: Sequence[float]) -> str:
    """A block a value, between the lowest and the highest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    steps = [round((value - low) / (high - low) * 7) if high > low else 0 for value in values]
    return "".join(_BLOCKS[step] for step in steps)


def stage_line(stage: StageView, *, under_way: bool, number: int, stages: int) -> list[RenderableType]:
    """A stage as a row: name, bar, updates, best validation, rate, remarks."""
    total = stage.updates or max(1, stage.done)
    over = stage.updates is not None and (stage.done >= stage.updates or stage.stopped_early)
    bar_style = "green" if over else "cyan"
    remarks = [f"lr {stage.lr:g}" if isinstance(stage.lr, float) else ""]
    remarks += ["ended early" if stage.stopped_early else "", f"{stage.skipped} skipped" if stage.skipped else ""]
    return [
        Text(f"{number}/{stages} {stage.name}", style="bold" if under_way else "" if stage.done else "dim"),
        ProgressBar(total=total, completed=stage.done, width=24, complete_style=bar_style, finished_style="green"),
        Text(f"{stage.done:,}/{stage.updates:,}" if stage.updates else "–" if not stage.done else f"{stage.done:,}"),
        Text(f"val {stage.val_loss:.4f}" if stage.val_loss is not None else ""),
        Text(", ".join(remark for remark in remarks if remark), style="yellow" if stage.skipped else "dim"),
    ]


def panel(run: RunView, *, width: int = 80, detailed: bool = True) -> RenderableType:
    """A run as lines for a terminal. detailed: with its curves, checkpoint and process, for `vpgtrans watch`."""
    stages = Table.grid(padding=(0, 2))
    for place, stage in enumerate(run.stages):
        stages.add_row(*stage_line(stage, under_way=stage.name == run.stage, number=place + 1, stages=len(run.stages)))
    parts: list[RenderableType] = []
    if detailed:
        head = Text.assemble((run.name, "bold"), "  ", (run.state, _STYLES.get(run.state, "")))
        if run.message:
            head.append(f"\n{run.message}", style=_STYLES.get(run.state, ""))
        parts.append(head)
    parts.append(stages)
    shown = [(title, show(run.last[key])) for key, title, show in _FIGURES if run.last.get(key) is not None]
    if shown:
        parts.append(Text("   ").join(Text.assemble((f"{title} ", "dim"), value) for title, value in shown))
    times = [f"{duration(run.seconds)} so far"] if run.seconds is not None else []
    if not run.over and run.left is not None:
        times.append(f"stage: {duration(run.left)} left")
        if run.left_all is not None and run.stage != run.stages[-1].name:
            times.append(f"whole run: about {duration(run.left_all)} left")
    if times:
        parts.append(Text("   ".join(times)))
    if detailed:
        parts += _details(run, width=width)
    return Group(*parts)


def _details(run: RunView, *, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for title, points, style in (("training loss", run.train, "cyan"), ("validation", run.validation, "green")):
        values = curve(points, max(10, min(60, width - 52)))
        if len(values) > 1:
            ends = f"  {values[0]:.3f} → {values[-1]:.3f}, lowest {min(value for _, value in points):.3f}"
            parts.append(Text.assemble((f"{title:<14}", "dim"), (sparkline(values), style), (ends, "dim")))
    facts = []
    if run.checkpoint is not None:
        facts.append(f"checkpoint {run.checkpoint}, {duration(run.checkpoint_age)} ago")
    if run.quiet is not None and not run.over:
        facts.append(f"last line {duration(run.quiet)} ago")
    if run.pid is not None and not run.over:
        facts.append(f"process {run.pid} on {run.host}")
    if run.arms:
        facts.append(f"arms done: {', '.join(run.arms)}")
    if facts:
        parts.append(Text("   ".join(facts), style="dim"))
    for skipped in run.skipped[-3:]:
        text = f"skipped: {skipped['stage']}, update {skipped['update']}: {skipped['skipped']}"
        parts.append(Text(text, style="yellow", overflow="ellipsis", no_wrap=True))
    if run.state == "killed":
        parts.append(Text("its process is gone; the same command with --resume goes on from the checkpoint"))
    return parts


class RunDisplay:
    """What the process that trains shows of itself on a terminal's stderr; nothing where there is none."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> "RunDisplay":
        if self.console.is_terminal and first_process():
            self._live = Live(console=self.console, transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, run: Callable[[], RunView]) -> None:
        """run: what is to be seen, asked for only where somebody looks."""
        if self._live is not None:
            self._live.update(panel(run(), detailed=False))


def follow(look: Callable[[], RunView], *, every: float, once: bool) -> None:
    """Show a run on stdout until it is over; without a terminal, once."""
    console = Console(file=sys.stdout)
    run = look()
    if once or run.over or not console.is_terminal:
        console.print(panel(run, width=console.width))
        return
    try:
        with Live(panel(run, width=console.width), console=console, auto_refresh=False) as live:
            while not run.over:
                time.sleep(every)
                run = look()
                live.update(panel(run, width=console.width), refresh=True)
    except KeyboardInterrupt:
        return  # of the watching; the run knows nothing of it


# --- tables for the log -------------------------------------------------------------------------


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
        rate = f"{row['lr']:g}" if row["lr"] is not None else "auto" if row["mode"] != "frozen" else ""
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
    # in a notebook rich would show the table beside the log, and write nothing
    Console(file=stream, width=100, color_system=None, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines() if line.strip())
