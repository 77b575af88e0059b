"""The verbs: what a command does once its arguments are checked."""

from vpgtrans.runs.compare import compare
from vpgtrans.runs.journey import train, transfer
from vpgtrans.runs.use import caption, evaluate, probe, validate

__all__ = ["caption", "compare", "evaluate", "probe", "train", "transfer", "validate"]
