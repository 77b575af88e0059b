"""Stopping when SIGINT or SIGTERM asks for it: after the update under way, with a checkpoint."""

import logging
import os
import signal
from types import FrameType
from typing import Any

from vpgtrans.processes import first_process

_LOGGER = logging.getLogger(__name__)


class Stopped(Exception):
    """Training ends here because a signal asked for it.

    Not KeyboardInterrupt, which Lightning's trainer turns into an exit of the process.
    """


class StopSignals:
    """Within the block the first SIGINT or SIGTERM is noted, and a second one raises Stopped at once.

    Outside the main thread nothing is noted: signals stay with whoever owns it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came, if one did."""
        self._before: dict[int, Any] = {}
        self._parent = os.getppid()

    def __enter__(self) -> "StopSignals":
        self.install()
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Take the signals (again: Lightning's trainer puts its own handler in front when `fit` begins)."""
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before.setdefault(signum, signal.getsignal(signum))
                signal.signal(signum, self._note)
        except ValueError:
            self._before.clear()

    @property
    def asked(self) -> bool:
        return self.signum is not None

    def check(self) -> None:
        """Raise Stopped if a signal came, or the process that started this one to train along is gone."""
        if self.asked or (not first_process() and os.getppid() != self._parent):
            raise Stopped

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Stopped
        self.signum = signum
        _LOGGER.warning("%s: stopping after this update and its checkpoint", signal.Signals(signum).name)
