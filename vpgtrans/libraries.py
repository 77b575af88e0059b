"""Advice and progress bars of the libraries that we stand on: kept off the terminal, their errors still show."""

import logging
import os
import sys
import warnings

_NOISY = (
    "transformers",
    "lightning",
    "pytorch_lightning",
    "datasets",
    "peft",
    "accelerate",
    "bitsandbytes",
    "matplotlib",
    "PIL",
    "torch",
    "tqdm",
)


def quieten() -> None:
    """For this process, from now on. Some libraries set the levels of their own loggers when they are imported, so
    that it is worth calling again afterwards."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():  # a download of gigabytes may show its progress on a terminal
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=rf"({'|'.join(_NOISY)})(\..*)?$")
    known = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in _NOISY]
    for name in {*_NOISY, *known}:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        # "Loading weights" bars are switched apart from the verbosity; the switch is the library's own
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
