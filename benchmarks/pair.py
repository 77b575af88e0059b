"""The real pair SmolLM2 135M -> Gemma 3 270M, opened once, and single stages of the quickstart on it.

What ablations.py and warmup_cache.py share; no script. Only stages that leave the LLM and the encoder as they are may
run here: every VLM gets its own connector and projector, the rest is one for all.
"""

import copy
from pathlib import Path
from typing import Any

import torch

from vpgtrans.config import InitialiserConfig
from vpgtrans.data.mixture import open_mixture
from vpgtrans.projector import Projector
from vpgtrans.recipe import Recipe, load_recipe
from vpgtrans.runs.parts import source_of
from vpgtrans.runs.start import prepare
from vpgtrans.training.checkpoints import Progress
from vpgtrans.training.config import Stage
from vpgtrans.training.fit import StageRun
from vpgtrans.training.log import RunLog
from vpgtrans.training.parts import changed_parts, set_trainable
from vpgtrans.training.samples import BadSamples
from vpgtrans.transfer.initialisers import initialise
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def one_stage(*, validate_samples: int, stage: dict[str, Any], **changes: Any) -> Recipe:
    """The quickstart with one stage: its warm-up with the keys of `stage` replaced (all of it, if they name one)."""
    base = {} if "name" in stage else load_recipe(QUICKSTART).stages[0].model_dump(mode="json")
    overrides = {"stages": [base | stage], "trainer.validate_samples": validate_samples}
    return load_recipe(QUICKSTART, overrides | changes)


class Timeline(RunLog):
    """A run's log, kept in memory."""

    def __init__(self) -> None:
        super().__init__(Path(), writes=False)
        self.lines: list[dict[str, Any]] = []

    def write(self, **figures: Any) -> None:
        self.lines.append(figures)

    @property
    def curve(self) -> list[list[float]]:
        """[samples, validation loss], the zeroth before any update."""
        return [[line["samples"], line["val_loss"]] for line in self.lines if "val_loss" in line]


class Pair:
    """Source VPG, target LLM and data of a recipe, open; first projectors are made once each."""

    def __init__(self, recipe: Recipe):
        """recipe: its initialiser must need the source LLM's words (a converter), or no other one can have them."""
        self.train, self.validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
        source = source_of(recipe)
        self.prepared = prepare(recipe, device=torch.device("cpu"), source=source, train=self.train)
        self._projectors: dict[InitialiserConfig, Projector] = {}

    def vlm(self, initialiser: InitialiserConfig) -> VLM:
        """A VLM before its first update."""
        if initialiser not in self._projectors:
            self._projectors[initialiser] = initialise(initialiser, self.prepared.context).projector.float()
        vpg = self.prepared.source.vpg
        vpg = VPG(vpg.encoder, copy.deepcopy(vpg.connector)).eval()
        projector = copy.deepcopy(self._projectors[initialiser])
        return VLM(vpg, projector, self.prepared.llm, prompt=self.prepared.prompt)

    def stage_run(self, recipe: Recipe, log: RunLog, *, features: Path | None = None) -> StageRun:
        """The recipe's only stage, ready to run from its initialiser; its validation images are in the cache then.

        features: directory of the feature caches, if not the user's.
        """
        (stage,) = recipe.stages
        assert shareable(stage), f"stage {stage.name} would change what all VLMs share"
        vlm = self.vlm(recipe.initialiser)
        set_trainable(vlm, stage)
        return StageRun(
            vlm,
            recipe,
            0,
            train=self.train,
            validation=self.validation,
            bad=BadSamples(recipe.data.max_bad_fraction),
            log=log,
            checkpoints=None,
            progress=Progress(),
            changed=changed_parts([stage]),
            features=features,
        )


def shareable(stage: Stage) -> bool:
    """Whether a stage leaves encoder and LLM as they are."""
    return stage.trainable["encoder"] == stage.trainable["llm"] == "frozen"
