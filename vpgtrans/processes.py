"""Which of several processes that train together this one is. Read from the environment, so no torch is needed.

Lightning starts processes 1 to N - 1 again with the command line of process 0 when training begins; torchrun and srun
start all at once. All do the same work up to the training, and there each takes its share of every batch. Process 0
alone writes files, shows progress and prints results; the others end when the training does.
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


def launched() -> tuple[int, int] | None:
    """Processes on this machine, and machines, if a launcher started them all: torchrun, or SLURM's srun.

    SLURM's variables also stand in a job's own shell, and in an interactive one nothing but the shell was started;
    Lightning, which has to see the same, tells it by the job's name.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # also under srun, which then starts torchrun itself
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    if by_srun():
        machines = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // machines, machines
    return None


def by_srun() -> bool:
    """Whether srun started this process."""
    return (
        "TORCHELASTIC_RUN_ID" not in os.environ
        and "SLURM_NTASKS" in os.environ
        and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    )


def launcher() -> str:
    """What started the processes, where `launched` says that something did."""
    return "srun" if by_srun() else "torchrun"
