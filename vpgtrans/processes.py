"""Which of several processes that train together this one is. Read from the environment, so no torch is needed.

Lightning starts processes 1 to N - 1 again with the command line of process 0 when training begins; torchrun starts
all at once. All do the same work up to the training, and there each takes its share of every batch. Process 0 alone
writes files, shows progress and prints results; the others end when the training does.
"""

import os

_GLOBAL, _LOCAL = ("RANK", "LOCAL_RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")


def _number(names: tuple[str, ...]) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def first_process() -> bool:
    """Whether this is the process that writes."""
    return _number(_GLOBAL) == 0


def local_rank() -> int:
    """Number of this process among those of its machine: the GPU it takes."""
    return _number(_LOCAL)


def by_torchrun() -> tuple[int, int] | None:
    """Processes on this machine, and machines, if torchrun started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    return here, int(os.environ["WORLD_SIZE"]) // here
