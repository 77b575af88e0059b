"""Processes that read, decode and tokenise while the model computes."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vpgtrans.errors import TrainingError

AHEAD = 4
"""Batches that each process prepares beforehand."""

_BLOCKS = 4
"""Free blocks of memory that Pillow keeps, of 16 MiB at most each."""

T = TypeVar("T")


def default_workers(device: torch.device, *, processes: int = 1) -> int:
    """Processes that load for one device: none beside a CPU that computes, for which they would compete."""
    if device.type == "cpu" or sys.platform != "linux":
        return 0
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes))


class Work(Dataset[T], ABC, Generic[T]):
    """Items by number that loading processes can make."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, number: int) -> T:
        """IndexError past the end."""

    def begin(self) -> None:
        """Called first in every loading process, which is a copy of this one: let go of what two must not share."""


class Loader(Generic[T]):
    """The items of a work in order, made by processes that stay until `close`; by this one if there are none."""

    def __init__(self, work: Work[T], *, workers: int, pin: bool = False):
        """pin: hand tensors on in pinned memory, from which a GPU copies while it computes."""
        several: dict[str, Any] = {}
        if workers:
            # Each tokenises for itself; the library would warn of its threads being forked.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            fork = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
            several = {
                "persistent_workers": True,
                "prefetch_factor": AHEAD,
                "multiprocessing_context": fork,
                "worker_init_fn": _begin,
            }
        self._running: Iterator[T] | None = None
        self._loader: DataLoader[T] = DataLoader(
            work, batch_size=None, shuffle=False, collate_fn=_as_it_is, num_workers=workers, pin_memory=pin, **several
        )

    def __iter__(self) -> Iterator[T]:
        """
        Raises:
            TrainingError: a process was killed, for instance because memory ran out.
        """
        with killed_is_said():
            # Held back while processes start, each of which keeps it so: Ctrl-C reaches all of a terminal's processes,
            # and the first one writes a checkpoint before it ends the others.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._running = iter(self._loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            while self._running is not None:
                try:
                    item = next(self._running)
                except StopIteration:
                    return
                except (ConnectionError, EOFError) as error:  # it was killed while it handed a tensor over
                    raise _killed(error) from error
                yield item

    def close(self) -> None:
        """End the processes; what they have made is lost."""
        # Said, not left to the last reference: a traceback may hold one.
        if isinstance(self._running, _MultiProcessingDataLoaderIter):
            self._running._shutdown_workers()
            self._loader._iterator = None  # what persists
        self._running = None


@contextlib.contextmanager
def killed_is_said() -> Iterator[None]:
    """Within the block a loading process that is killed is a TrainingError.

    torch notices by a signal, so its own error comes up wherever this process is: around training, too. What a process
    raises itself is handed on by torch as "Caught …", and comes through.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _killed(error) from error


def _killed(error: Exception) -> TrainingError:
    detail = (str(error).splitlines() or [type(error).__name__])[0].strip()
    return TrainingError(
        f"a process that loads data was killed ({detail}); if memory is short, right would be fewer data.workers or a "
        "smaller batch_size"
    )


def _as_it_is(item: T) -> T:
    return item


def _begin(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.freeze()  # what was there before need not be looked through again, and stays in shared pages
    # Memory of decoded images is used again (PILLOW_BLOCKS_MAX sets the same): new pages cost a tenth of a decoding.
    Image.core.set_blocks_max(max(_BLOCKS, Image.core.get_blocks_max()))
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Work)
    info.dataset.begin()
