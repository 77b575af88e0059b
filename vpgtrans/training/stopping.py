"""Signals to a run that trains: stopping with a checkpoint, or saving one and going on; and ending with the others."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import lightning as L

from vpgtrans.processes import first_process, launched

_LOGGER = logging.getLogger(__name__)
_FIRST = "VPGTRANS_FIRST_PROCESS"
"""Environment variable: the process that starts others to train along."""
_WATCHER = "first-process-watcher"
_POLL = 0.5


class Stopped(Exception):
    """Training ends here because a signal asked for it.

    Not KeyboardInterrupt, which Lightning's trainer turns into an exit of the process.
    """


class StopSignals:
    """Within the block the first SIGINT or SIGTERM is noted, and a second one raises Stopped at once.

    SIGUSR1 is noted, too: it asks for a checkpoint, and the run goes on. Outside the main thread nothing is noted:
    signals stay with whoever owns it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came, if one did; of several processes whichever got it, once they have agreed."""
        self._save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.install()
        if first_process():
            os.environ[_FIRST] = str(os.getpid())
        else:
            end_with_first_process()
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Take the signals."""
        wanted = {signal.SIGINT: self._note, signal.SIGTERM: self._note, signal.SIGUSR1: self._note_save}
        try:
            for signum, handler in wanted.items():
                self._before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, handler)
        except ValueError:
            self._before.clear()

    @property
    def asked(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raise Stopped if a signal came."""
        if self.asked:
            raise Stopped

    def agree(
        self, over_devices: Callable[[Sequence[float]], Sequence[float]], *, saving: bool = True
    ) -> tuple[bool, bool]:
        """Whether any of the processes that train together was asked for a checkpoint, and whether they stop then.

        Called by all at the same update. What reaches one of them later counts at the next.

        over_devices: sums figures over them. saving: whether there is anything to save yet; else it stays asked for.
        """
        saves = self._save and saving
        own = (self.signum == signal.SIGINT, self.signum == signal.SIGTERM, saves)
        interrupted, terminated, saved = over_devices([float(flag) for flag in own])
        if saves:
            self._save = False
        if not self.asked and (interrupted or terminated):
            self.signum = signal.SIGTERM if terminated else signal.SIGINT
        stops = bool(interrupted or terminated)
        return stops or bool(saved), stops

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Stopped
        self.signum = signum
        _LOGGER.warning("%s: stopping after this update and its checkpoint", signal.Signals(signum).name)

    def _note_save(self, signum: int, frame: FrameType | None) -> None:
        self._save = True
        _LOGGER.warning("SIGUSR1: a checkpoint follows after this update, and the run goes on")


def keep_signals(trainer: L.Trainer) -> None:
    """Leave signals to `StopSignals`: the trainer's own handlers would end a run with exit code 0, and requeue a job
    of SLURM without a checkpoint of ours."""
    trainer._signal_connector.register_signal_handlers = lambda: None


def end_with_first_process() -> None:
    """End this process, which was started to train along, when the one that started it is gone.

    It may wait in an exchange with it, or for a first one that never comes, and notices nothing by itself.
    """
    started_by = os.environ.get(_FIRST)
    if first_process() or launched() is not None or started_by is None:
        return  # torchrun and SLURM look after their processes
    if any(thread.name == _WATCHER for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == int(started_by):
            time.sleep(_POLL)
        os._exit(1)

    threading.Thread(target=watch, name=_WATCHER, daemon=True).start()
