"""Updates that would harm what was learnt: a loss or a gradient that is not finite, or a loss that is a spike.

A spike is a loss far above the median of the last ones, in units of their spread: 1.4826 times the median distance from
that median, which is the standard deviation of normal noise and moves little by the outliers it is to find (Hampel
1974, "The influence curve and its role in robust estimation"). PaLM (2022, section 5.1) and OPT (2022, section 2.5)
skipped such batches by hand.
"""

import logging
import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from vpgtrans.errors import TrainingError
from vpgtrans.training.config import GuardConfig

_LOGGER = logging.getLogger(__name__)

WINDOW = 64
"""Losses that the next one is compared with."""
ENOUGH = 24
"""As long as there are fewer, nothing is a spike."""
LEAST_SPREAD = 0.02
"""Share of the median below which a spread is taken for this: a stage that has learnt its data has hardly any."""
LEAST = 0.01
"""Nats below which a spread is taken for this: where a stage knows its data by heart, losses are thousandths, and one
that is twenty times the median harms nothing."""
NORMAL = 1.4826
"""Standard deviations in a median distance from the median, of normal noise."""


class Guard:
    """Judges the updates of a stage. All it knows is in `state`, so that a resumed run judges alike."""

    def __init__(self, config: GuardConfig | None = None, *, stage: str = ""):
        self.config = config or GuardConfig()
        self.stage = stage
        self.losses: list[float] = []
        """The last ones that were no spikes, in this stage."""
        self.skipped = 0
        """Updates of the run."""
        self.of_stage = 0
        """Of them, those in this stage."""
        self.last: dict[str, Any] | None = None
        """What the log says of the last update, if it was skipped."""

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"losses": list(self.losses), "skipped": self.skipped, "of_stage": self.of_stage}

    def resume(self, state: dict[str, Any], *, same_stage: bool) -> None:
        """Go on from `state`; another stage has losses of its own."""
        self.skipped = state.get("skipped", 0)
        if same_stage:
            self.losses, self.of_stage = list(state.get("losses", [])), state.get("of_stage", 0)

    def problem(self, loss: float, norm: float) -> str | None:
        """Why an update must not be made; None if it may, and its loss counts from now on."""
        self.last = None
        for name, value in (("the loss", loss), ("the gradient's norm", norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self.config.spike is not None and len(self.losses) >= ENOUGH:
            middle, spread = _spread(self.losses)
            if loss - middle > self.config.spike * spread:
                return (
                    f"the loss is {loss:.4g}, a spike: {(loss - middle) / spread:.1f} deviations above the last ones' "
                    f"median, {middle:.4g}"
                )
        self.losses = [*self.losses[1 - WINDOW :], loss]
        return None

    def skip(self, problem: str, *, update: int, loss: float, norm: float, ids: Sequence[str]) -> None:
        """Count and record an update that is not made.

        Args:
            update: its number in the stage, from 1. ids: of its samples, on all devices.

        Raises:
            TrainingError: these are too many.
        """
        self.skipped += 1
        self.of_stage += 1
        where = f"stage {self.stage}, update {update}: {problem}"
        if self.skipped > self.config.max_skipped:
            allowed = self.config.max_skipped
            many = f", and {allowed} updates were skipped before, as many as trainer.guard.max_skipped allows"
            raise TrainingError(
                f"{where}{many if allowed else ''}; the batch held {', '.join(ids)}. Lower the learning rate, or look "
                "at these samples; what was saved before stays"
            )
        _LOGGER.warning("%s; skipped (%d of at most %d)", where, self.skipped, self.config.max_skipped)
        figures = {"skipped_loss": loss, "skipped_grad_norm": norm}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self.last = {"skipped": problem, **finite, "ids": list(ids)}


def _spread(losses: Sequence[float]) -> tuple[float, float]:
    """Median and robust standard deviation."""
    middle = median(losses)
    spread = NORMAL * median(abs(loss - middle) for loss in losses)
    return middle, max(spread, LEAST_SPREAD * abs(middle), LEAST)
