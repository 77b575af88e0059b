"""The verbs: what a command does once its arguments are checked."""

from vpgtrans.runs.compare import compare
from vpgtrans.runs.data import data_stats
from vpgtrans.runs.journey import train, transfer
from vpgtrans.runs.packs import data_pack
from vpgtrans.runs.plan import plan
from vpgtrans.runs.publishing import publish
from vpgtrans.runs.use import caption, evaluate, probe, validate

__all__ = [
    "caption",
    "compare",
    "data_pack",
    "data_stats",
    "evaluate",
    "plan",
    "probe",
    "publish",
    "train",
    "transfer",
    "validate",
]
