"""The verbs: what a command does once its arguments are checked."""

from vpgtrans.runs.journey import train, transfer

__all__ = ["train", "transfer"]
