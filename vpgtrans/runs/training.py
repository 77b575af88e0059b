"""The stages of a run, one after another, resumable; the same loop for transfer, train and every arm of a comparison."""

import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch

from vpgtrans.data.sources import Mixture
from vpgtrans.errors import VpgTransError
from vpgtrans.recipe import Recipe
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.training.checkpoints import Checkpoint, Checkpoints, Progress
from vpgtrans.training.fit import RunLog, StageResult, StageRun
from vpgtrans.training.parts import changed_parts, put_state, set_trainable, table, take_state
from vpgtrans.training.samples import BadSamples
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)


class Interrupted(VpgTransError):
    """A signal asked the run to stop; a checkpoint was written."""

    def __init__(self, signum: int, where: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}; {where} --resume goes on")
        self.exit_code = 128 + signum


def run_stages(
    vlm: VLM,
    recipe: Recipe,
    run: RunDirectory,
    *,
    train: Mixture,
    validation: Mixture,
    resume: bool,
    keep_checkpoints: bool = True,
    initial_seconds: float = 0.0,
) -> list[StageResult]:
    """Train through all stages; the VLM is left at the best validation of the last one.

    Writes metrics.jsonl, trainable.json, skipped.jsonl and checkpoints into `run`.

    Args:
        initial_seconds: what came before on the bill (converter, probe).

    Raises:
        TrainingError: a loss that is not finite, or too many unreadable images. Interrupted: SIGINT or SIGTERM.
    """
    log = RunLog(run.metrics)
    checkpoints = Checkpoints(run.checkpoints) if keep_checkpoints else None
    found = checkpoints.load() if checkpoints and resume else None
    progress = found.progress if found else Progress(seconds=initial_seconds)
    if found:
        log.cut(progress)
        _LOGGER.info("resuming at stage %s, update %d", recipe.stages[progress.stage].name, progress.update)
    bad = BadSamples(recipe.data.max_bad_fraction)
    tables: list[dict[str, Any]] = []
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    with _stop_signals() as asked:
        for index, stage in enumerate(recipe.stages):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed + 7919 * (index + 1))  # the adapter's first weights
                set_trainable(vlm, stage)
            tables += table(vlm, stage)
            run.write("trainable.json", tables)
            if index < progress.stage:
                continue
            changed = changed_parts(recipe.stages[: index + 1])
            if found and index == progress.stage:
                before = changed if found.optimizer is not None else changed_parts(recipe.stages[:index])
                put_state(vlm, found.state, before, where=str(run.checkpoints))
            if progress.update == 0:
                progress.stage_start = {
                    "samples": progress.samples,
                    "text_tokens": progress.text_tokens,
                    "seconds": progress.seconds,
                }
                progress.best = {}
            _show_table(tables[-4:])
            stage_run = StageRun(
                vlm,
                recipe,
                index,
                train=train,
                validation=validation,
                bad=bad,
                log=log,
                checkpoints=checkpoints,
                progress=progress,
                changed=changed,
                accelerator="gpu" if vlm.device.type == "cuda" else "cpu",
                stop_asked=lambda: bool(asked),
            )
            resumed = found if found and index == progress.stage and found.optimizer is not None else None
            try:
                result = stage_run.run(resumed.optimizer if resumed else None, resumed.best_state if resumed else None)
            except KeyboardInterrupt:
                raise Interrupted(asked[0] if asked else signal.SIGINT, str(run.path)) from None
            finally:
                _write_skipped(run, bad)
            progress.finished.append(asdict(result))
            progress.stage, progress.update = index + 1, 0
            if checkpoints is not None and index + 1 < len(recipe.stages):
                state = take_state(vlm, changed)
                checkpoints.save(Checkpoint(progress=progress, state=state, best_state={}, optimizer=None))
    return [StageResult(**values) for values in progress.finished]


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Within the block the first SIGINT or SIGTERM is noted in the list, and a second one acts at once."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signum)
        _LOGGER.warning("%s: stopping after this update and its checkpoint", signal.Signals(signum).name)

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            before[signum] = signal.signal(signum, note)
    except ValueError:
        pass  # not the main thread: signals stay with whoever owns it
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _show_table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        rate = f"lr {row['lr']:g}" if row["lr"] is not None else ""
        _LOGGER.info(
            "%s  %-9s  %-6s  %s of %s parameters train  %s",
            row["stage"], row["part"], row["mode"], f"{row['trained']:,}", f"{row['parameters']:,}", rate,
        )  # fmt: skip


def _write_skipped(run: RunDirectory, bad: BadSamples) -> None:
    import json

    if bad.bad:
        lines = [json.dumps({"id": name, "reason": reason}) + "\n" for name, reason in bad.bad.items()]
        (run.path / "skipped.jsonl").write_text("".join(lines))


def first_reach(curve: list[tuple[int, float]], level: float) -> float | None:
    """Samples until a validation curve first lies at or below `level`; None if it never does."""
    return next((samples for samples, value in curve if value <= level and math.isfinite(value)), None)
