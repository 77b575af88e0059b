"""Running one stage: data in order, Lightning's trainer, validations, the log, checkpoints."""

import contextlib
import logging
import math
import time
import warnings
from dataclasses import asdict, dataclass
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
from vpgtrans.progress import RunDisplay
from vpgtrans.prompts import Prompter
from vpgtrans.recipe import Recipe
from vpgtrans.training.checkpoints import Checkpoint, Checkpoints, Progress
from vpgtrans.training.config import Stage
from vpgtrans.training.devices import data_workers, trainer_devices, world_size
from vpgtrans.training.draws import Draws, SampleDraws, pack_draws
from vpgtrans.training.features import FrozenFront, Level
from vpgtrans.training.fitting import fitted
from vpgtrans.training.guard import Guard
from vpgtrans.training.loading import Updates, Validator
from vpgtrans.training.log import RunLog
from vpgtrans.training.module import StageModule
from vpgtrans.training.objectives import build_objectives
from vpgtrans.training.parts import put_state
from vpgtrans.training.rates import as_line, as_picked, pick_rate, resolved
from vpgtrans.training.samples import WINDOW, BadSamples, Samples
from vpgtrans.training.stopping import Stopped, StopSignals, keep_signals
from vpgtrans.training.strategies import make_together
from vpgtrans.training.throughput import meter_of
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
    skipped: int = 0
    """Updates that the guard left out."""
    stopped_early: bool = False
    range_test: dict[str, Any] | None = None
    """Rate and cost of what `lr: auto` did, see `training.rates`; its seconds are among the stage's."""
    samples_per_second: float | None = None
    """This and the next two: of the updates alone, validations and preparation aside."""
    tokens_per_second: float | None = None
    mfu: float | None = None


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
        self.index = index
        self.stage = stage = as_picked(recipe.stages[index], progress, index)
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
        elif recipe.trainer.unpad and not recipe.trainer.compile:
            vlm.splice.unpad(recipe.trainer.attention)
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
            guard=Guard(recipe.trainer.guard, stage=stage.name),
        )
        self.module.guard.resume(progress.guard, same_stage=progress.update > 0)
        self.meter = meter_of(vlm, stage, progress.work, cached=cached)
        self.best_state: dict[str, Tensor] = {}
        self._saved: int | None = None
        self.display = RunDisplay()

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
        progress = self.progress
        self.best_state = best_state or {}
        trainer = self.trainer(self.module, Watch(self))
        self.data.draws.check(trainer.world_size)
        if optimizer_state is not None:
            self.module.resume_optimizer = optimizer_state
        self.module.to(self.vlm.device)
        try:
            with self.display, killed_is_said():
                if self.stage.lr == "auto":
                    self._pick_rate()
                if len(self.data) and not self.gave_up:
                    self.fit(trainer, self.module, self.data)
        finally:
            self.data.close()
            self.validator.close()
        put_state(self.vlm, self.best_state, self.changed, where=f"best of stage {self.stage.name}")
        self.vlm.eval()
        start = progress.stage_start
        return StageResult(
            name=self.stage.name,
            updates=progress.update,
            samples=progress.samples - int(start["samples"]),
            seconds=progress.seconds - start["seconds"],
            val_loss=progress.best["val_loss"],
            best_samples=progress.best["samples"],
            text_tokens=progress.text_tokens - int(start["text_tokens"]),
            peak_memory_bytes=span_peak(),
            skipped=self.module.guard.of_stage,
            stopped_early=self.gave_up and progress.update < self.updates,
            range_test=progress.picked or None,
            **self.meter.overall(),
        )

    def trainer(self, module: StageModule, callback: L.Callback) -> L.Trainer:
        """Lightning's, for one pass over updates; everything beside the updates is the callback's."""
        world = world_size(self.recipe, self.vlm.device)
        module.together = make_together(self.recipe.trainer.strategy, module, world)
        trainer = L.Trainer(
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[callback],
            strategy=module.together.plugin(),
            **trainer_devices(self.recipe.trainer, self.vlm.device),
        )
        keep_signals(trainer)
        return trainer

    def fit(self, trainer: L.Trainer, module: StageModule, data: Updates) -> None:
        """Every device trains on its share of each update."""
        data.rank, data.world = trainer.global_rank, trainer.world_size
        self.bad.shared = trainer.world_size > 1
        with warnings.catch_warnings(), contextlib.ExitStack() as around:
            # The blocks that train: in shards they are others than the VLM's own.
            config = self.recipe.trainer
            module.fit_blocks = lambda vlm: around.enter_context(fitted(vlm, module.stage, config))
            # Frozen parts are in eval mode on purpose, and the data are read by one process in order.
            warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")
            warnings.filterwarnings("ignore", r"Your `IterableDataset` has `__len__` defined")
            trainer.fit(module, DataLoader(data, batch_size=None, num_workers=0))
            module.together.join()
            module.to(trainer.strategy.root_device)  # the trainer leaves it on the CPU

    def _pick_rate(self) -> None:
        """Find the rate that `lr: auto` leaves open. It is on the bill, and kept with the run's progress."""
        picked = pick_rate(self)
        self.progress.picked = asdict(picked)
        self.progress.seconds += picked.seconds
        self.stage = self.module.stage = resolved(self.stage, picked.rate)
        self.log.write(**self.position(), **as_line(picked))

    @property
    def gave_up(self) -> bool:
        """Whether the stage ends here because its validation loss no longer falls."""
        rule = self.stage.early_stopping
        return rule is not None and self.progress.patience.get("since", 0) >= rule.patience

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
        self._note_patience(value)
        if progress.update > 0:
            self.save()

    def _note_patience(self, value: float) -> None:
        rule, patience = self.stage.early_stopping, self.progress.patience
        if rule is None:
            return
        if not patience or value < patience["best"] - rule.min_delta or not math.isfinite(patience["best"]):
            self.progress.patience = {"best": value, "since": 0}
        else:
            patience["since"] += 1
        if self.gave_up:
            since = int(self.progress.patience["since"])
            _LOGGER.info("%s: ends early, no improvement in %d validations", self.stage.name, since)

    def save(self) -> None:
        """Write a checkpoint of this moment, if there is none yet."""
        self.progress.guard = self.module.guard.state  # the next stage counts on, also where nothing is written
        if self.checkpoints is None or self._saved == self.progress.update:
            return
        self.meter.flush()
        self.checkpoints.save(
            Checkpoint(
                progress=self.progress,
                state=self.module.together.take(self.changed),
                best_state=self.best_state,
                optimizer=self.module.together.optimizer_state(self.module.together.optimizer),
            )
        )
        self._saved = self.progress.update
