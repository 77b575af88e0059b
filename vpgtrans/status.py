"""`status.json` of a run: which process works on it, where it is, and how it ended. Plain files; no torch, no rich.

A thread writes it every few seconds as long as the process lives, also while it evaluates or waits for data: whoever
looks at it from another machine can tell a run that works from one whose machine is gone.
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vpgtrans.errors import VpgTransError
from vpgtrans.processes import first_process

FILE = "status.json"
EVERY = 5.0
"""Seconds between two writes."""
SILENT = 60.0
"""Seconds without one after which a process on another machine counts as gone."""


class Status:
    """What a run says of itself, from `begin` to the end of the block; the first of several processes alone writes.

    state: running, then finished, interrupted (a signal) or failed.
    """

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._said: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._directory is None:
            return
        self._ended.set()
        code = getattr(error, "exit_code", None)
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit) or (code or 0) > 128
        state = "finished" if error is None else "interrupted" if interrupted else "failed"
        message = str(error) if isinstance(error, VpgTransError) else "" if error is None else repr(error)
        self.say(state=state, message=message)

    def begin(self, directory: Path) -> None:
        """From now on there is a run in `directory`."""
        if not first_process() or self._directory is not None:
            return
        self._directory = directory
        self.say(state="running", host=socket.gethostname(), pid=os.getpid(), started=time.time())
        threading.Thread(target=self._beat, name="status", daemon=True).start()

    def say(self, **facts: Any) -> None:
        """Add facts, such as the stage and its length, and write all of them."""
        with self._lock:
            self._said |= facts
            if self._directory is None:
                return
            temporary = self._directory / f".{FILE}.tmp"
            try:
                temporary.write_text(json.dumps(self._said | {"time": time.time()}, indent=2) + "\n")
                os.replace(temporary, self._directory / FILE)
            except OSError:
                temporary.unlink(missing_ok=True)  # a full disk: what matters will say so itself

    def _beat(self) -> None:
        while not self._ended.wait(EVERY):
            if not self._ended.is_set():
                self.say()


_KINDS: dict[str, type | tuple[type, ...]] = {
    "state": str, "host": str, "pid": int, "time": (int, float), "updates": dict, "message": str,
}  # fmt: skip


def read_status(directory: Path) -> dict[str, Any]:
    """What `status.json` says; empty where there is none, or half of one. What is damaged in it is left out."""
    try:
        said = json.loads((directory / FILE).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {key: value for key, value in said.items() if isinstance(value, _KINDS.get(key, object))}


def works(said: dict[str, Any], *, now: float) -> bool:
    """Whether the process that wrote a status still lives: by its number on this machine, else by its last sign."""
    if said.get("state") != "running":
        return False
    if said.get("host") != socket.gethostname():
        return now - said.get("time", 0.0) < SILENT
    try:
        os.kill(said["pid"], 0)
    except (ProcessLookupError, KeyError, OverflowError):
        return False
    except PermissionError:
        return True
    # Another process may have its number by now; then nobody writes.
    return now - said.get("time", 0.0) < 10 * SILENT
