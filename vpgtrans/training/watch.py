"""What happens beside the updates of a stage: validations, the log, the progress bar, checkpoints, stopping."""

import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from vpgtrans.following import RunView, StageView
from vpgtrans.training.samples import Batch, Key, Unreadable
from vpgtrans.training.stopping import Stopped

if TYPE_CHECKING:
    from vpgtrans.training.fit import StageRun

_COUNTED = ("text_tokens", "tokens")
"""Figures of an update that the log has as sums or rates."""


class Watch(L.Callback):
    """Validation, log, progress bar and checkpoints of one stage."""

    def __init__(self, run: "StageRun"):
        self.run = run
        self.clock = time.perf_counter()
        self.exchanged = run.bad.left_out
        self.begun = run.progress.seconds, run.progress.update
        self.line: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.stop.install()
        if self.run.unvalidated:
            self.run.validate()  # here and not before `fit`: now the devices know each other
            trainer.should_stop = self.run.gave_up
        self._exchange_bad(trainer)
        self.begun = self.run.progress.seconds, self.run.progress.update
        self.clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        run, module = self.run, self.run.module
        now = time.perf_counter()
        took, samples = now - self.clock, len(run.data.draws.update(module.done - 1).rows)
        self.clock = now
        run.progress.seconds += took
        run.progress.update = module.done
        run.progress.samples += samples
        run.progress.text_tokens += int(module.last["text_tokens"])
        run.meter.add(batch, seconds=took, samples=samples, tokens=module.last["tokens"])
        every = max(1, run.updates // 400)
        if module.guard.last is not None:
            run.log.write(**run.position(), **module.guard.last)
        elif module.done % every == 0 or module.done == run.updates:
            figures = {name: value for name, value in module.last.items() if name not in _COUNTED}
            self.line = figures | run.meter.line()
            run.log.write(**run.position(), **self.line)
        run.display.show(self.view)
        if module.done % run.validate_every == 0 or module.done == run.updates:
            run.validate()
            trainer.should_stop = run.gave_up
            self.clock = time.perf_counter()
        elif run.checkpoint_due:
            run.save()
        self._exchange_bad(trainer)
        # All processes stop, or save, at the same update, whichever of them the signal reached.
        saves, stops = run.stop.agree(module.over_devices)
        if saves:
            run.save()
        if stops:
            raise Stopped

    def view(self) -> RunView:
        """The run as it is now, for its display. Stages to come are taken to go at this one's pace."""
        run, progress, stages = self.run, self.run.progress, self.run.recipe.stages
        shown = []
        for result in progress.finished:
            names = ("updates", "samples", "val_loss", "stopped_early", "skipped")
            figures = {name: result[name] for name in names if name in result}
            shown.append(StageView(**figures, name=result["name"], done=result["updates"]))
        best, skipped = progress.best.get("val_loss"), run.module.guard.of_stage
        rate = max(run.stage.rates.values())
        shown.append(StageView(run.stage.name, run.updates, progress.update, val_loss=best, lr=rate, skipped=skipped))
        shown += [StageView(stage.name) for stage in stages[run.index + 1 :]]
        found = RunView(str(run.recipe.name), run.recipe.name, "running", stages=shown, stage=run.stage.name)
        found.seconds, found.last = progress.seconds, self.line | run.module.last
        seconds, updates = progress.seconds - self.begun[0], progress.update - self.begun[1]
        if updates:
            found.left = seconds / updates * (run.updates - progress.update)
            later = sum(stage.budget.samples or 0 for stage in stages[run.index + 1 :])
            if all(stage.budget.samples is not None for stage in stages[run.index + 1 :]):
                found.left_all = found.left + seconds / updates / run.data.draws.per_update * later
        return found

    def _exchange_bad(self, trainer: L.Trainer) -> None:
        """Unreadable images that one process met count for all, which decide alike."""
        bad = self.run.bad
        if not bad.shared:
            return
        if trainer.strategy.reduce_boolean_decision(bad.left_out > self.exchanged, all=False):
            listed: list[tuple[dict[Key, Unreadable], dict[Key, Unreadable]]] = [({}, {})] * trainer.world_size
            torch.distributed.all_gather_object(listed, (bad.bad, bad.dropped))
            for unreadable, dropped in listed:
                bad.bad |= unreadable
                bad.dropped |= dropped
            self.exchanged = bad.left_out
            bad.check()
