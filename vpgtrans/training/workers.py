"""Processes that read, decode and tokenise while the model computes."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

AHEAD = 4
"""Batches that each process prepares beforehand."""


def default_workers(device: torch.device, *, processes: int = 1) -> int:
    """Processes that load for one device: none beside a CPU that computes, for which they would compete."""
    if device.type == "cpu" or sys.platform != "linux":
        return 0
    return max(1, min(8, len(os.sched_getaffinity(0)) // processes))


class Loader:
    """The items of a dataset in order, made by processes that stay until the next iteration; by this one if 0."""

    def __init__(self, dataset: Dataset[Any], *, workers: int, pin: bool = False):
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
        self._loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin, **several)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def _begin(_: int) -> None:
    # Ctrl-C reaches every process of a terminal; the first one writes a checkpoint and then ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
