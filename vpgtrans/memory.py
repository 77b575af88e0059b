"""Peak memory of the process in spans of a run: on the GPU where one is used, else resident.

Only Linux lets a process reset its own peak; elsewhere every span reports the peak since the process began.
"""

import contextlib
import re
import resource
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

_before = 0
"""Largest peak of the spans that have ended, in bytes."""


def forget() -> None:
    """Begin a run: what this process used before is not its own."""
    global _before
    start_span()
    _before = 0


def start_span() -> None:
    """End the span under way and begin another one."""
    global _before
    _before = max(_before, span_peak())
    if torch.cuda.is_initialized():  # a run on the CPU must not wake a GPU
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _RESET.write_text("5")  # see proc(5): the peak resident size becomes the present one


def span_peak() -> int:
    """Bytes, since the span began."""
    if torch.cuda.is_initialized() and torch.cuda.max_memory_allocated() > 0:
        return int(torch.cuda.max_memory_allocated())
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def overall_peak() -> int:
    """Bytes, over all spans since `forget`."""
    return max(_before, span_peak())
