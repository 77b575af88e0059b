"""`lr: auto`: a learning-rate range test before a stage, on its own data.

After Smith (2017, "Cyclical learning rates for training neural networks", section 3.3): train with a rate that grows
from update to update, and see from where on the loss falls, and where it no longer does. The rate grows exponentially;
every update's loss is compared with that of the same samples before training, so that easy and hard batches don't
blur the curve. The stage's state is put back afterwards, bit for bit.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from vpgtrans.training.checkpoints import Progress
from vpgtrans.training.config import Stage
from vpgtrans.training.guard import Guard
from vpgtrans.training.loading import Updates
from vpgtrans.training.module import StageModule
from vpgtrans.training.parts import put_state, take_state
from vpgtrans.training.samples import Batch
from vpgtrans.training.stopping import Stopped

if TYPE_CHECKING:
    from vpgtrans.training.fit import StageRun

_LOGGER = logging.getLogger(__name__)

UPDATES = 40
LOWEST, HIGHEST = 1e-5, 1e-1
WINDOW = 5
"""Updates that a point of the smoothed curve is the mean of."""
WORSE = 1.0
"""Nats above its lowest point at which the smoothed curve has diverged: the test ends there."""
REACHED = 0.9
"""The rate picked is the first one at which the smoothed loss has fallen by this share of all that it falls. Where it
is lowest is chance, since between there and the rise lies a plateau."""


@dataclass
class Picked:
    """What a range test came to: `summary.json` has it under `range_test`."""

    rate: float
    updates: int
    samples: int
    seconds: float
    rates: list[float]
    gains: list[float]
    """Loss of each update's samples less what it was before training, nats."""


def resolved(stage: Stage, rate: float) -> Stage:
    """A stage of `lr: auto` with the rate that was picked."""
    return stage.model_copy(update={"lr": rate})


def as_picked(stage: Stage, progress: Progress, index: int) -> Stage:
    """A run's stage number `index`, with the rate that a range test has picked, if one has."""
    if index < len(progress.finished):
        picked = progress.finished[index].get("range_test")
    else:
        picked = progress.picked if index == progress.stage else None
    return resolved(stage, picked["rate"]) if picked else stage


def rate_at(update: int, updates: int = UPDATES) -> float:
    """The rate of an update of the test."""
    return LOWEST * (HIGHEST / LOWEST) ** (update / (updates - 1))


def smooth(gains: Sequence[float]) -> list[float]:
    """Centred running means, over as many on both sides as there are at the ends."""
    means = []
    for place in range(len(gains)):
        half = min(WINDOW // 2, place, len(gains) - 1 - place)
        means.append(sum(gains[place - half : place + half + 1]) / (2 * half + 1))
    return means


def pick(rates: Sequence[float], gains: Sequence[float]) -> float:
    """The rate for a stage out of a range test's curve, rounded to two digits.

    Where nothing falls, that is the lowest rate of the test; as well where there is no curve.
    """
    if not gains:
        return LOWEST
    curve = smooth(gains)
    enough = REACHED * min(curve)
    return float(f"{next(rate for rate, gain in zip(rates, curve, strict=True) if gain <= enough):.2g}")


def pick_rate(run: "StageRun") -> Picked:
    """Run the test from where the stage begins. All devices come to the same."""
    started = time.perf_counter()
    state = take_state(run.vlm, run.changed)
    updates = Updates(
        run.data.samples, run.data.draws, start=0, stop=UPDATES, workers=run.data.workers, pin=run.data.pin
    )
    updates.prepare(f"{run.stage.name}: images of the range test", each=run.stop.check)
    sweep = _Sweep(run, updates)
    stage = run.stage.model_copy(update={"lr": 1.0, "warmup_fraction": 0.0})
    module = _SweepModule(
        run.vlm, stage, front=run.module.front, objectives=run.module.objectives, updates=UPDATES,
        seed=run.recipe.seed, stream=run.module.stream, optimizer=run.module.optimizer, guard=_NoGuard(),
    )  # fmt: skip
    try:
        run.fit(run.trainer(module, sweep), module, updates)
    finally:
        updates.close()
    put_state(run.vlm, state, run.changed, where=f"start of stage {run.stage.name}")
    rate = pick(sweep.rates, sweep.gains)
    seconds = time.perf_counter() - started
    _LOGGER.info("%s: learning rate %g, by a range test of %d updates, %.1f s", stage.name, rate, module.done, seconds)
    return Picked(rate, module.done, sweep.samples, round(seconds, 3), sweep.rates, sweep.gains)


def as_line(picked: Picked) -> dict[str, Any]:
    """For the log."""
    return {"picked_lr": picked.rate, "range_test": asdict(picked)}


class _SweepModule(StageModule):
    """A stage whose rate grows; nothing is skipped, since what goes wrong is what the test is after."""

    def rate_factor(self, update: int) -> float:
        return rate_at(update, self.updates)


class _NoGuard(Guard):
    """Leaves out what is not finite alone, which may be the samples' fault: the test goes on with the next ones."""

    def problem(self, loss: float, norm: float) -> str | None:
        return None if math.isfinite(loss) else f"the loss is {loss}"

    def skip(self, problem: str, **_: Any) -> None:
        """The stage itself will meet these samples, and count them."""


class _Sweep(L.Callback):
    """Losses of the updates, before any of them and on the way."""

    def __init__(self, run: "StageRun", updates: Updates):
        self.run = run
        self.updates = updates
        self.before: list[float] = []
        self.rates: list[float] = []
        self.gains: list[float] = []
        self.samples = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        self.run.stop.install()
        for number, batch in enumerate(self.updates):
            self._stop_if_asked(pl_module)
            self.before.append(_loss(pl_module, batch, number))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, StageModule)
        self._stop_if_asked(pl_module)
        done = pl_module.done - 1
        self.samples += len(self.updates.draws.update(done).rows)
        if not math.isfinite(self.before[done]) or "left_out" in pl_module.last:
            return  # it was so before anything was trained, or there is nothing: that says nothing of the rate
        gain = pl_module.last["loss"] - self.before[done]
        curve = smooth(self.gains)
        if not math.isfinite(gain) or (curve and curve[-1] > min(curve) + WORSE and gain > min(curve) + WORSE):
            trainer.should_stop = True
        if math.isfinite(gain):
            self.rates.append(rate_at(done))
            self.gains.append(gain)

    def _stop_if_asked(self, module: StageModule) -> None:
        if self.run.stop.agree(module.over_devices, saving=False)[1]:
            raise Stopped


@torch.no_grad()
def _loss(module: StageModule, batch: Batch, number: int) -> float:
    """A batch's loss as an update would have it, over all devices."""
    module.seed_dropout(number)
    weights = {name: goal.weight(batch, module.vlm.vpg.tokens) for name, goal in module.objectives.items()}
    sums = dict.fromkeys(weights, 0.0)
    for part in module.together.paced(batch.parts(module.stage.micro_batch_size)):
        for name, (summed, _) in module.losses(part).items():
            sums[name] += summed.item()
    whole = module.over_devices([*sums.values(), *weights.values()])
    pairs = zip(sums, whole[: len(sums)], whole[len(sums) :], strict=True)
    return sum(module.loss_weights[name] * summed / (weight or 1.0) for name, summed, weight in pairs)
