"""What happens beside the updates of a stage: validations, the log, the progress bar, checkpoints, stopping."""

import time
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from vpgtrans.training.samples import Key, Unreadable
from vpgtrans.training.stopping import Stopped

if TYPE_CHECKING:
    from vpgtrans.training.fit import StageRun


class Watch(L.Callback):
    """Validation, log, progress bar and checkpoints of one stage."""

    def __init__(self, run: "StageRun"):
        self.run = run
        self.clock = time.perf_counter()
        self.exchanged = run.bad.left_out

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.run.stop.install()
        if self.run.unvalidated:
            self.run.validate()  # here and not before `fit`: now the devices know each other
        self._exchange_bad(trainer)
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        run, module = self.run, self.run.module
        now = time.perf_counter()
        run.progress.seconds += now - self.clock
        self.clock = now
        run.progress.update = module.done
        run.progress.samples += len(run.data.draws.update(module.done - 1).rows)
        run.progress.text_tokens += int(module.last["text_tokens"])
        every = max(1, run.updates // 400)
        if module.done % every == 0 or module.done == run.updates:
            run.log.write(**run.position(), **{k: v for k, v in module.last.items() if k != "text_tokens"})
        run.show(module.last["loss"])
        if module.done % run.validate_every == 0 or module.done == run.updates:
            run.validate()
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
