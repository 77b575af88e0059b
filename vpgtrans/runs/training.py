"""The stages of a run, one after another, resumable: one loop for transfer, train and every arm of a comparison."""

import json
import logging
import signal
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from vpgtrans.data.mixture import Mixture
from vpgtrans.errors import VpgTransError, rule_of
from vpgtrans.files import appearing
from vpgtrans.processes import first_process
from vpgtrans.progress import trainable_table
from vpgtrans.recipe import Recipe
from vpgtrans.runs.directory import RunDirectory
from vpgtrans.shortage import peers_are_missed, shortages_are_said
from vpgtrans.training.checkpoints import Checkpoint, Checkpoints, Clock, Progress
from vpgtrans.training.fit import StageResult, StageRun
from vpgtrans.training.log import RunLog
from vpgtrans.training.loggers import told_by
from vpgtrans.training.parts import changed_parts, put_state, set_trainable, table, take_state
from vpgtrans.training.rates import as_picked
from vpgtrans.training.samples import BadSamples
from vpgtrans.training.stopping import Stopped, StopSignals
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)


class Interrupted(VpgTransError):
    """A signal asked the run to stop; a checkpoint was written, if anything was trained."""

    of_all = True

    def __init__(self, signum: int, where: str, *, saved: bool = True):
        name = signal.Signals(signum).name
        what = "a checkpoint is" if saved else "there is no checkpoint yet"
        super().__init__(f"stopped by {name}; {what} in {where}; the same command with --resume goes on from there")
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
    clock: Clock | None = None,
) -> list[StageResult]:
    """Train through all stages; the VLM is left at the best validation of the last one.

    Writes metrics.jsonl, trainable.json, data.json, quarantine.jsonl and checkpoints into `run`.

    Args:
        initial_seconds: what came before on the bill (converter, probe). clock: of the run; it is set to go on from an
            earlier start's time.

    Raises:
        TrainingError: a loss that is not finite, too many unreadable images, or another process that trains along is
            gone. MachineError: memory or disk ran out. Interrupted: SIGINT or SIGTERM.
    """
    # Of several processes the first one writes; the others do the same work on their share of each batch.
    first = first_process()
    log = RunLog(run.metrics, writes=first, told=told_by(recipe, run.path) if first else ())
    checkpoints = Checkpoints(run.checkpoints, writes=first, clock=clock) if keep_checkpoints else None
    found = checkpoints.load() if checkpoints and resume else None
    progress = found.progress if found else Progress(seconds=initial_seconds)
    resumed_stage = progress.stage
    bad = BadSamples(recipe.data.max_bad_fraction, earlier=_read_skipped(run) if resume else {})
    if resume:
        stage = recipe.stages[resumed_stage]
        log.cut(progress, stage.name)
        _LOGGER.info("resuming at stage %s, update %d", stage.name, progress.update)
    tables: list[dict[str, Any]] = []
    lengths = {result["name"]: result["updates"] for result in progress.finished}
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    with StopSignals() as stop, closing(log):
        for index, stage in enumerate(recipe.stages):
            vlm.set_resolution(recipe.resolution_of(stage))
            here = found if index == resumed_stage else None
            if here and here.optimizer is None:
                put_state(vlm, here.state, changed_parts(recipe.stages[:index]), where=str(run.checkpoints))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed + 7919 * (index + 1))  # the adapter's first weights
                set_trainable(vlm, stage)
            tables += table(vlm, as_picked(stage, progress, index))
            if first:
                run.write("trainable.json", tables)
            if index < resumed_stage:
                continue
            changed = changed_parts(recipe.stages[: index + 1])
            if here and here.optimizer is not None:
                put_state(vlm, here.state, changed, where=str(run.checkpoints))
            if progress.update == 0:
                progress.stage_start = {
                    "samples": progress.samples,
                    "text_tokens": progress.text_tokens,
                    "seconds": progress.seconds,
                }
                progress.best, progress.patience, progress.picked, progress.work = {}, {}, {}, {}
            _LOGGER.info("%s", trainable_table(tables[-4:]))
            kept = _kept(checkpoints)
            try:
                with shortages_are_said(f"stage {stage.name}", kept=kept), peers_are_missed(kept):
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
                        stop=stop,
                    )
                    lengths[stage.name] = stage_run.updates
                    run.status.say(updates=lengths)
                    result = stage_run.run(here.optimizer if here else None, here.best_state if here else None)
            except Stopped:
                saved = checkpoints is not None and checkpoints.newest is not None
                raise Interrupted(stop.signum or signal.SIGINT, str(run.path), saved=saved) from None
            finally:
                if first:
                    _write_counts(run, bad)
            progress.finished.append(asdict(result))
            if result.range_test is not None:
                tables[-4:] = table(vlm, as_picked(stage, progress, index))
                run.write("trainable.json", tables)
            progress.stage, progress.update = index + 1, 0
            if checkpoints is not None and index + 1 < len(recipe.stages):
                state = take_state(vlm, changed)
                checkpoints.save(Checkpoint(progress=progress, state=state, best_state={}, optimizer=None))
    return [StageResult(**values) for values in progress.finished]


def _kept(checkpoints: Checkpoints | None) -> str:
    """What is left of a run that ends here."""
    return "" if checkpoints is None else f"the last good checkpoint in {checkpoints.directory} is kept"


def _write_counts(run: RunDirectory, bad: BadSamples) -> None:
    """quarantine.jsonl, if anything is bad, and data.json: distinct samples seen since the run was begun (or
    resumed), and what became of them."""
    counts = {
        "seen": bad.seen,
        "used": bad.seen - bad.left_out,
        "quarantined": bad.quarantined,
        "dropped": len(bad.dropped),
        "rules": dict(Counter(rule_of(entry.reason) for entry in bad.dropped.values())),
    }
    run.write("data.json", counts)
    if bad.left_out:
        _LOGGER.info("samples: %(seen)d seen, %(used)d used, %(quarantined)d bad, %(dropped)d left out by rule", counts)
    if bad.listed:
        lines = [json.dumps({"id": name, "reason": reason}) + "\n" for reason, name in bad.listed.items()]
        with appearing(run.path / "quarantine.jsonl") as temporary:
            temporary.write_text("".join(lines))


def _read_skipped(run: RunDirectory) -> dict[str, str]:
    try:
        lines = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return {}  # none so far
    return {line["reason"]: line["id"] for line in lines}
