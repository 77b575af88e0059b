"""Running one stage: data in order, Lightning's trainer, validations, the log, checkpoints."""

import contextlib
import logging
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vpgtrans.config import AugmentConfig, Mode, Part
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.packs import measure
from vpgtrans.errors import DataError
from vpgtrans.memory import span_peak, start_span
from vpgtrans.progress import bar
from vpgtrans.prompts import Prompter
from vpgtrans.recipe import Recipe
from vpgtrans.training.checkpoints import Checkpoint, Checkpoints, Progress
from vpgtrans.training.config import Stage
from vpgtrans.training.devices import data_workers, trainer_devices, world_size
from vpgtrans.training.draws import Draws, SampleDraws, pack_draws
from vpgtrans.training.features import FrozenFront, Level
from vpgtrans.training.fitting import fitted
from vpgtrans.training.loading import Updates, Validator
from vpgtrans.training.log import RunLog
from vpgtrans.training.module import StageModule
from vpgtrans.training.objectives import build_objectives
from vpgtrans.training.parts import put_state
from vpgtrans.training.samples import WINDOW, BadSamples, Samples
from vpgtrans.training.stopping import Stopped, StopSignals, keep_signals
from vpgtrans.training.strategies import make_together
from vpgtrans.training.watch import Watch
from vpgtrans.training.workers import killed_is_said
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)
VOCABULARY_SAMPLES = 100_000
"""Training samples whose words the `words` objective tells apart, where there are more."""


def boundary(stage: Stage, augmentation: AugmentConfig | None, *, native: bool = False) -> tuple[Level, bool]:
    """How far the frozen front of a stage reaches, and whether its output is cached.

    native: images come in their own shapes, for which a cache has no rows.
    """
    always_new = augmentation is not None and augmentation.views is None
    if native or always_new or stage.trainable["encoder"] != "frozen":
        return "pixels", False
    level: Level = "tokens" if stage.trainable["connector"] == "frozen" else "patches"
    return level, stage.cache_features is not False


def count_updates(stage: Stage, draws: Draws, prompter: Prompter) -> int:
    """A stage's budget in optimizer updates; one in tokens by the mean answer's length.

    Raises:
        DataError: none of the samples looked at is readable.
    """
    samples = stage.budget.samples
    if samples is None:
        assert stage.budget.tokens is not None
        lengths = []
        drawn = draws.typical().tolist()
        next(draws.mixture.readable(drawn))  # raises where none is
        for row in drawn:
            with contextlib.suppress(DataError):  # left out when its batch comes
                lengths.append(draws.mixture.encode(row, prompter).answers)
        if not sum(lengths):
            raise DataError(f"stage {stage.name}: its budget is in tokens, and no sample looked at has an answer")
        samples = math.ceil(stage.budget.tokens * len(lengths) / sum(lengths))
    return draws.updates(samples)


@dataclass
class StageResult:
    """What a stage came to: `summary.json` lists it under these keys."""

    name: str
    updates: int
    samples: int
    seconds: float
    val_loss: float
    best_samples: int
    text_tokens: int
    peak_memory_bytes: int


class StageRun:
    """One stage of a run, from `progress.update` to its end."""

    def __init__(
        self,
        vlm: VLM,
        recipe: Recipe,
        index: int,
        *,
        train: Mixture,
        validation: Mixture,
        bad: BadSamples,
        log: RunLog,
        checkpoints: Checkpoints | None,
        progress: Progress,
        changed: dict[Part, Mode],
        stop: StopSignals | None = None,
        features: Path | None = None,
    ):
        """features: directory of the feature caches, if not the user's.

        Raises:
            TrainingError: too many of the samples whose features are cached are unreadable.
            Stopped: a signal asked for it.
        """
        start_span()
        self.vlm = vlm
        self.recipe = recipe
        self.stage = stage = recipe.stages[index]
        self.log = log
        self.checkpoints = checkpoints
        self.progress = progress
        self.changed = changed
        self.stop = stop or StopSignals()
        self.bad = bad
        prompter = vlm.splice.prompter
        augment = recipe.augmentation(stage)
        level, cached = boundary(stage, augment, native=vlm.vpg.native)
        if vlm.vpg.native and stage.trainable["encoder"] == "frozen":
            _LOGGER.info("%s: images of native size go through the encoder each time; nothing is cached", stage.name)
        front = FrozenFront(vlm.vpg, level, dtype=torch.float32 if level == "pixels" else torch.bfloat16)
        workers = data_workers(recipe, vlm.device)
        samples = Samples(
            train, front, prompter, bad=bad, cached=cached, augment=augment, seed=recipe.seed, directory=features
        )
        if recipe.data.packing is not None:
            vlm.splice.isolate(recipe.trainer.attention, longest=recipe.data.packing.max_tokens)
        draws = self._draws(samples, index)
        self.updates = count_updates(stage, draws, prompter)
        every = stage.validate_every or math.ceil(self.updates / 10) * draws.per_update
        self.validate_every = max(1, round(every / draws.per_update))
        self.data = Updates(
            samples,
            draws,
            start=progress.update,
            stop=self.updates,
            workers=workers,
            pin=vlm.device.type == "cuda",
        )
        held_out = Samples(validation, front, prompter, bad=bad, cached=cached, directory=features, role="validation")
        rows = np.arange(len(validation))
        if recipe.trainer.validate_samples is not None:
            # The same subset for every run: a fixed permutation, not the run's seed.
            rows = np.sort(np.random.default_rng(0).permutation(len(validation))[: recipe.trainer.validate_samples])
        packing = recipe.data.packing
        self.validator = Validator(
            held_out, [int(row) for row in rows], workers=workers, pack_tokens=packing.max_tokens if packing else None
        )
        started = time.perf_counter()
        unreadable = self.data.prepare(f"{stage.name}: images", each=self.stop.check)
        unreadable += self.validator.prepare(f"{stage.name}: validation images", each=self.stop.check)
        self.preparation_seconds = time.perf_counter() - started
        progress.seconds += self.preparation_seconds
        visited = self.data.visited()
        bad.expected = min(len(visited) + len(self.validator.rows), WINDOW)
        if cached:
            bad.note(unreadable, seen=samples.see(visited) + held_out.see(self.validator.rows))
            bad.check()  # all processes know the same, so none has to wait for the others

        self.module = StageModule(
            vlm,
            stage,
            front=front,
            objectives=build_objectives(list(stage.losses), vlm, train.captions(VOCABULARY_SAMPLES)),
            updates=self.updates,
            done=progress.update,
            seed=recipe.seed,
            stream=index,
            optimizer=recipe.trainer.optimizer,
        )
        self.best_state: dict[str, Tensor] = {}
        self._saved: int | None = None
        self._bar = bar()
        self._task = self._bar.add_task(stage.name, total=self.updates, completed=progress.update, note="")

    def _draws(self, samples: Samples, index: int) -> Draws:
        """Which samples come when; of a packed run the samples that no pack holds are counted as left out.

        Raises:
            DataError: no sample fits a pack. IntegrityError: a pack plan that was kept is damaged.
            TrainingError: too many samples are bad.
        """
        stage, seed, train, packing = self.stage, self.recipe.seed, samples.mixture, self.recipe.data.packing
        if packing is None:
            first = int(self.progress.stage_start["samples"])
            return SampleDraws(train, seed=seed, stage=stage, first_sample=first)
        lengths = measure(train, samples.prompter)
        draws = pack_draws(train, lengths, packing, stage, seed=seed, index=index)
        samples.set_aside(lengths, packing)
        count, size, tokens = draws.packs, draws.order.samples_per_pack, draws.order.tokens_per_pack
        _LOGGER.info("%s: %d pack(s) an update, of %.1f samples and %.0f tokens", stage.name, count, size, tokens)
        return draws

    def run(
        self, optimizer_state: dict[str, Any] | None = None, best_state: dict[str, Tensor] | None = None
    ) -> StageResult:
        """Train to the end of the stage; the VLM is left at its best validation loss.

        Raises:
            TrainingError: a loss that is not finite, or too many unreadable images.
            RecipeError: there are more devices than samples in a batch.
            Stopped: a signal asked for it, and a checkpoint was written.
        """
        stage, progress = self.stage, self.progress
        self.best_state = best_state or {}
        strategy = self.recipe.trainer.strategy
        self.module.together = make_together(strategy, self.module, world_size(self.recipe, self.vlm.device))
        trainer = L.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Watch(self)],
            strategy=self.module.together.plugin(),
            **trainer_devices(self.recipe.trainer, self.vlm.device),
        )
        keep_signals(trainer)
        self.data.rank, self.data.world = trainer.global_rank, trainer.world_size
        self.bad.shared = trainer.world_size > 1
        self.data.draws.check(trainer.world_size)
        if optimizer_state is not None:
            self.module.resume_optimizer = optimizer_state
        self.module.to(self.vlm.device)
        try:
            with (
                self._bar,
                killed_is_said(),
                fitted(self.vlm, stage, self.recipe.trainer),
                warnings.catch_warnings(),
            ):
                # Frozen parts are in eval mode on purpose, and the data are read by one process in order.
                warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
                warnings.filterwarnings("ignore", r"Your `IterableDataset` has `__len__` defined")
                if len(self.data):
                    trainer.fit(self.module, DataLoader(self.data, batch_size=None, num_workers=0))
                    self.module.together.join()
                    self.module.to(trainer.strategy.root_device)  # the trainer leaves it on the CPU
        finally:
            self.data.close()
            self.validator.close()
        put_state(self.vlm, self.best_state, self.changed, where=f"best of stage {stage.name}")
        self.vlm.eval()
        start = progress.stage_start
        return StageResult(
            name=stage.name,
            updates=progress.update,
            samples=progress.samples - int(start["samples"]),
            seconds=progress.seconds - start["seconds"],
            val_loss=progress.best["val_loss"],
            best_samples=progress.best["samples"],
            text_tokens=progress.text_tokens - int(start["text_tokens"]),
            peak_memory_bytes=span_peak(),
        )

    def position(self) -> dict[str, Any]:
        """Where the run is, for a line of the log."""
        progress = self.progress
        return {
            "stage": self.stage.name,
            "update": progress.update,
            "samples": progress.samples,
            "text_tokens": progress.text_tokens,
            "seconds": round(progress.seconds, 3),
        }

    def show(self, loss: float) -> None:
        best = self.progress.best.get("val_loss")
        note = f"loss {loss:.3f}" + (f", best validation {best:.3f}" if best is not None else "")
        self._bar.update(self._task, completed=self.progress.update, note=note)

    @property
    def unvalidated(self) -> bool:
        """Whether the validation at this update is still to come: at the start, or where a signal cut it short."""
        progress = self.progress
        due = progress.update % self.validate_every == 0 and progress.validated != progress.update
        return due or not progress.best

    @property
    def checkpoint_due(self) -> bool:
        every = self.recipe.trainer.checkpoint_every
        return every is not None and self.progress.update % every == 0

    def validate(self) -> None:
        """Measure, log, remember the best, write a checkpoint.

        Raises:
            Stopped: a signal came, and this process is alone and not at the end; a checkpoint was written, and the run
                goes on with this validation.
        """
        started = time.perf_counter()
        progress = self.progress
        alone = self.module.world == 1 and progress.update < self.updates
        try:
            value = self.validator(self.module, each=self.stop.check if alone else lambda: None)
        except Stopped:
            if progress.update > 0:
                self.save()
            raise
        progress.seconds += time.perf_counter() - started
        progress.validated = progress.update
        self.log.write(**self.position(), val_loss=value)
        _LOGGER.info("%s: %d samples, validation loss %.4f", self.stage.name, progress.samples, value)
        if not progress.best or value < progress.best["val_loss"] or not math.isfinite(progress.best["val_loss"]):
            progress.best = {"val_loss": value, "samples": progress.samples, "update": progress.update}
            self.best_state = self.module.together.take(self.changed)
        if progress.update > 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of this moment, if there is none yet."""
        if self.checkpoints is None or self._saved == self.progress.update:
            return
        self.checkpoints.save(
            Checkpoint(
                progress=self.progress,
                state=self.module.together.take(self.changed),
                best_state=self.best_state,
                optimizer=self.module.together.optimizer_state(self.module.together.optimizer),
            )
        )
        self._saved = self.progress.update
