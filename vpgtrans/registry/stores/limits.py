"""How long a store is waited for, and how much is read: servers that hang, drip or never end cost little."""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vpgtrans.errors import StoreError, UserError

log = logging.getLogger(__name__)

FLOW = 64 * 1024
"""Bytes that must arrive while as long as `patience` is waited, unless the file ends before."""
_AHEAD = 8
"""Pieces that are read while the ones before are hashed and written."""


_WAITS = (0.5, 1.5, 4.5)
"""Seconds before a store is asked once more."""
_PROGRESS = 1 << 20
"""Bytes after which a broken connection counts as the first one again."""

T = TypeVar("T")


def patience() -> float:
    """Seconds that a server may be silent: $VPGTRANS_STORE_TIMEOUT, else 20. UserError for what is no such number."""
    text = os.environ.get("VPGTRANS_STORE_TIMEOUT", "20")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 3600:
        raise UserError(f"$VPGTRANS_STORE_TIMEOUT is {text!r}; it must be seconds, from 0.1 to 3600")
    return seconds


def watched(start: Callable[[], Iterator[bytes]], *, what: str) -> Iterator[bytes]:
    """The pieces that an iterator gives, read ahead in a thread of its own and waited for with patience.

    The time limits of libraries are for one answer of the network each, so a server that sends a byte now and then
    never meets them. Here the time spent waiting counts until `FLOW` bytes have come.

    Raises:
        StoreError: too little came; may be tried again. And what the iterator raises.
    """
    pieces: queue.Queue[bytes | BaseException | None] = queue.Queue(_AHEAD)
    over = threading.Event()

    def hand_over(piece: bytes | BaseException | None) -> bool:
        while not over.is_set():
            try:
                pieces.put(piece, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def run() -> None:
        try:
            for piece in start():
                if not hand_over(piece):
                    return
            hand_over(None)
        except BaseException as error:  # raised again by the one who waits
            hand_over(error)

    # A daemon: a thread that hangs in the system's name look-up must not keep the process from ending.
    threading.Thread(target=run, daemon=True, name=f"reading {what}").start()
    limit = patience()
    waited, came = 0.0, 0
    try:
        while True:
            began = time.monotonic()
            try:
                piece = pieces.get(timeout=max(0.0, limit - waited))
            except queue.Empty:
                raise StoreError(f"{what}: {_little(came)} came in {limit:g} seconds", again=True) from None
            waited += time.monotonic() - began
            if piece is None:
                return
            if isinstance(piece, BaseException):
                raise piece
            came += len(piece)
            if came >= FLOW:
                waited, came = 0.0, 0
            yield piece
    finally:
        over.set()


def persistently(attempt: Callable[[], T], *, came: Callable[[], int] = int) -> T:
    """What `attempt` returns; it is called up to three times more where a StoreError says that this may help.

    came: bytes that came until now; a connection that brings something each time may break as often as it likes.
    """
    waits = iter(_WAITS)
    while True:
        before = came()
        try:
            return attempt()
        except StoreError as error:
            if came() - before >= _PROGRESS:
                waits = iter(_WAITS)
            wait = next(waits, None)
            if wait is None or not error.again:
                raise
            log.info("%s; once more in %g s", error, wait)
            time.sleep(wait)


def _little(count: int) -> str:
    return f"only {count:,} bytes" if count else "nothing"
