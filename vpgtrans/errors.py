"""Errors a user can meet. Each carries the exit code that the CLI returns for it.

A message says what is wrong, where (file, key, line) and what would be right.
"""


class VpgTransError(Exception):
    """Base of every error that is reported as one message, without a traceback."""

    exit_code = 1
    of_all = False
    """Whether all processes that train together raise it at the same time, so that the first one's report is enough."""


class UserError(VpgTransError):
    """The user's input is wrong; nothing was written."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe has an unknown key, a wrong type or values that don't fit together."""


class ReferenceError_(UserError):
    """A model, VPG or data reference doesn't resolve; the message lists what was tried."""


class DataError(UserError):
    """A data set is empty, unreadable or lacks what was asked of it."""


class Dropped(DataError):
    """A row that a stated rule leaves out, such as one without a caption. It is counted, and is no bad sample."""


def rule_of(reason: str) -> str:
    """The rule in what a `Dropped` says, without the file and row before it."""
    return reason.rpartition(": ")[2]


class TransferError(UserError):
    """Two models can't be joined: widths that differ, tokenizers that share too little."""


class OutputError(UserError):
    """The output directory holds another run or can't be written."""


class IntegrityError(VpgTransError):
    """A checksum differs, a checkpoint is damaged, or a file belongs to another base."""

    exit_code = 4


class CheckpointError(IntegrityError):
    """A VLM directory or checkpoint has a missing, extra, mis-shaped or altered tensor."""


class RegistryError(UserError):
    """A registry file is malformed or has no such entry."""


class StoreError(VpgTransError):
    """A place of files can't be reached, lacks them, or answers with an error."""

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again
        """Whether it may help to ask once more: a server that is busy or silent, not one that says no."""


class MachineError(VpgTransError):
    """Memory or disk ran out, or a directory can't be written any more. What was saved before is whole."""


class TrainingError(VpgTransError):
    """Training stopped: a non-finite loss, or too many unreadable images."""

    of_all = True
