"""`metrics.jsonl` and `metrics.csv`: what a run says of itself while it trains; and who else is told."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from vpgtrans.training.checkpoints import Progress

COLUMNS = (
    "stage", "update", "samples", "text_tokens", "seconds", "loss", "loss_caption", "loss_words", "val_loss", "lr",
    "grad_norm", "samples_per_second", "tokens_per_second", "mfu", "memory_bytes", "left_out", "skipped",
    "skipped_loss", "skipped_grad_norm", "picked_lr",
)  # fmt: skip
"""Of metrics.csv. A line of metrics.jsonl may hold lists besides, which stay out of it."""

Place = tuple[str, int, bool]
"""Stage and update of a line, and whether it is a validation's."""


class Told(Protocol):
    """Somebody else who is told what the log holds."""

    def log(self, figures: dict[str, float], *, stage: str, samples: int) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """A line per logged update, per validation and per skipped update, in both files."""

    def __init__(self, path: Path, *, writes: bool = True, told: Sequence[Told] = ()):
        """path: of the JSON lines; the table lies beside it. writes: whether `write` does anything; of several
        processes only the first one's does."""
        self.path = path
        self.writes = writes
        self.told = told
        self._known: set[Place] = set()

    @property
    def table(self) -> Path:
        """The same as a table."""
        return self.path.with_suffix(".csv")

    def write(self, **figures: Any) -> None:
        if not self.writes:
            return
        new = not self.path.exists()
        with self.path.open("a") as stream:
            stream.write(json.dumps(figures) + "\n")
        with self.table.open("w" if new else "a", newline="") as stream:
            table = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
            if new:
                table.writeheader()
            table.writerow(figures)
        if _place(figures) not in self._known:
            numbers = {name: value for name, value in figures.items() if isinstance(value, float | int)}
            for other in self.told:
                other.log(numbers, stage=figures["stage"], samples=figures["samples"])

    def close(self) -> None:
        """Tell the others that this was all."""
        for other in self.told:
            other.close()

    def cut(self, progress: Progress, stage: str) -> None:
        """Drop what a run that is resumed here, in `stage`, wrote after its checkpoint.

        The others keep it, since they can't forget, and are not told again.
        """
        if not self.path.exists() or not self.writes:
            return
        finished = {result["name"] for result in progress.finished}
        kept = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the process was killed while it wrote
            self._known.add(_place(line))
            # At update 0 a stage validates anew.
            current = line["stage"] == stage and progress.update > 0 and line["update"] <= progress.update
            if line["stage"] in finished or current:
                kept.append(text)
        _replace(self.path, "".join(text + "\n" for text in kept))
        rows = [json.loads(text) for text in kept]
        temporary = self.table.with_name(f".{self.table.name}.tmp")
        with temporary.open("w", newline="") as stream:
            table = csv.DictWriter(stream, COLUMNS, extrasaction="ignore", lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        os.replace(temporary, self.table)


def _place(line: dict[str, Any]) -> Place:
    return line["stage"], line["update"], "val_loss" in line


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
