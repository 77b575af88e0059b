"""`metrics.jsonl`: what a run says of itself while it trains."""

import json
import os
from pathlib import Path
from typing import Any

from vpgtrans.training.checkpoints import Progress


class RunLog:
    """`metrics.jsonl`: a line per logged update and per validation."""

    def __init__(self, path: Path, *, writes: bool = True):
        """writes: whether `write` does anything; of several processes only the first one's does."""
        self.path = path
        self.writes = writes

    def write(self, **figures: Any) -> None:
        if not self.writes:
            return
        with self.path.open("a") as stream:
            stream.write(json.dumps(figures) + "\n")

    def cut(self, progress: Progress, stage: str) -> None:
        """Drop what a run that is resumed here, in `stage`, wrote after its checkpoint."""
        if not self.path.exists() or not self.writes:
            return
        finished = {result["name"] for result in progress.finished}
        kept = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the process was killed while it wrote
            # At update 0 a stage validates anew.
            current = line["stage"] == stage and progress.update > 0 and line["update"] <= progress.update
            if line["stage"] in finished or current:
                kept.append(text + "\n")
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.path)
