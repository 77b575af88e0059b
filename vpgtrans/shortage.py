"""What a machine fails a run with, as one message instead of a traceback: memory, disk, a process that is gone."""

import contextlib
import errno
from collections.abc import Iterator

import torch

from vpgtrans.errors import MachineError, TrainingError

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc", "cannot allocate memory")
"""What allocators of torch say, which raise a RuntimeError without a kind of its own."""

_PEERS = ("connection closed by peer", "connection reset by peer", "broken pipe", "nccl", "gloo")
"""What an exchange between processes says when one of them has ended."""

SMALLER = (
    "a smaller stages[].micro_batch_size (of packed data data.packing.max_tokens, in a new run), "
    "trainer.gradient_checkpointing=true, or a device with more memory; `vpgtrans plan RECIPE` says what a recipe takes"
)


@contextlib.contextmanager
def shortages_are_said(what: str, *, kept: str = "") -> Iterator[None]:
    """Within the block an error of memory or disk becomes a MachineError.

    Args:
        what: was under way. kept: what is left of the run.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        left = f"; {kept}" if kept else ""
        if _of_memory(error):
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MachineError(f"{what}: memory ran out ({detail}){left}. Right would be {SMALLER}") from error
        if isinstance(error, OSError) and error.errno in _DISK:
            where = f"{error.filename}: " if error.filename else ""
            raise MachineError(
                f"{what}: {where}{error.strerror}{left}. Right would be more room there (see `df`, quotas and limits), "
                "or a directory that may be written to"
            ) from error
        raise


@contextlib.contextmanager
def peers_are_missed(kept: str) -> Iterator[None]:
    """Within the block an exchange with a process that is gone is a TrainingError."""
    try:
        yield
    except RuntimeError as error:  # torch's own errors of an exchange are of that kind, too
        exchanging = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not exchanging or not any(said in str(error).lower() for said in _PEERS):
            raise
        detail = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"a process that trains along is gone, killed or stopped by an error of its own ({detail}); {kept}, and "
            "the same command with --resume goes on from it"
        ) from error


def _of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(said in str(error).lower() for said in _MEMORY)
