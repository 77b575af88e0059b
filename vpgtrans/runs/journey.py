"""`transfer` and `train`: from a recipe to a run directory with a VLM, a summary and a report."""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpgtrans.config import InitialiserConfig, ProjectorConfig, PromptConfig, VPGConfig
from vpgtrans.data.sources import Mixture
from vpgtrans.errors import RecipeError
from vpgtrans.evaluation.metrics import score
from vpgtrans.llm import read_embeddings
from vpgtrans.recipe import Recipe, recipe_hash
from vpgtrans.report import write_report
from vpgtrans.runs.card import model_card
from vpgtrans.runs.directory import open_run
from vpgtrans.runs.parts import (
    Source,
    check_widths,
    open_mixture,
    open_source,
    open_target,
    pick_device,
    visual_tokens,
)
from vpgtrans.runs.training import run_stages
from vpgtrans.training.fit import peak_memory
from vpgtrans.training.parts import changed_parts
from vpgtrans.transfer.initialisers import Context, Initialisation, initialise
from vpgtrans.transfer.probe import Scoring, choose
from vpgtrans.transfer.scores import CopyTest
from vpgtrans.vision.preprocess import to_rgb
from vpgtrans.vlm import VLM, Splice
from vpgtrans.vlm_directory import save_vlm

SAMPLES_SHOWN = 24
"""Held-out images in the report."""
SCORING_IMAGES = 96
"""Images on which an initialiser is calibrated and scored before training."""


@dataclass
class Start:
    """A VLM before its first update, and how it came about."""

    vlm: VLM
    source: Source
    initialisation: Initialisation
    table: list[dict[str, Any]]
    """Rows of initialisers.json."""
    train: Mixture
    validation: Mixture
    seconds: float
    """Of the initialiser, its scoring included where it is `auto`: part of the bill."""


def transfer(
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "auto",
) -> Path:
    """Move a VPG to the recipe's target LLM; returns the run directory. See `vpgtrans.api.transfer`."""
    if isinstance(recipe.source.vpg, VPGConfig):
        raise RecipeError("source.vpg builds a VPG from scratch: that is `vpgtrans train`; transfer takes a reference")
    return _journey(recipe, output=output, resume=resume, overwrite=overwrite, dry_run=dry_run, device=device)


def train(
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "auto",
) -> Path:
    """Train a VPG from scratch with the recipe's LLM; returns the run directory. See `vpgtrans.api.train`."""
    if not isinstance(recipe.source.vpg, VPGConfig):
        raise RecipeError(
            f"source.vpg is the reference {recipe.source.vpg!r}: that is `vpgtrans transfer`; train takes "
            "{encoder: …, connector: …}"
        )
    if recipe.initialiser.kind not in ("auto", "random"):
        raise RecipeError(f"initialiser: a VPG from scratch has no source projector, so {recipe.initialiser.kind} "
                          "can't be used; leave it out or write random")  # fmt: skip
    chosen = recipe.model_copy(update={"initialiser": InitialiserConfig(kind="random")})
    return _journey(chosen, output=output, resume=resume, overwrite=overwrite, dry_run=dry_run, device=device)


def _journey(recipe: Recipe, *, output: Path | None, resume: bool, overwrite: bool, dry_run: bool, device: str) -> Path:
    started = time.perf_counter()
    where = pick_device(device)
    if dry_run:
        begin(recipe, device=where)
        return output or Path("runs") / recipe.name
    # Everything that the user may have got wrong is opened before a file of the run is written.
    source = open_source(recipe.source.vpg, seed=recipe.seed)
    check_widths(source)
    train_data, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    run, resuming = open_run(recipe, output, resume=resume, overwrite=overwrite)
    start = begin(recipe, device=where, source=source, train=train_data, validation=validation)
    vlm = start.vlm
    run.write("initialisers.json", start.table)
    shown = [int(row) for row in np.random.default_rng(1).permutation(len(validation))[:SAMPLES_SHOWN]]
    before = _captions(vlm, validation, shown, recipe)
    lineage = _lineage(recipe, start)
    run.write("lineage.json", lineage)
    results = run_stages(
        vlm,
        recipe,
        run,
        train=start.train,
        validation=validation,
        resume=resuming,
        initial_seconds=start.seconds,
    )
    scored = list(range(min(recipe.evaluation.samples, len(validation))))
    predictions = _captions(vlm, validation, scored, recipe)
    run.write("samples.json", _samples(validation, shown, before, _captions(vlm, validation, shown, recipe)))
    summary = {
        "name": recipe.name,
        "initialiser": start.initialisation.name,
        "val_loss": results[-1].val_loss,
        "metrics": score(predictions, [[validation.caption(row)] for row in scored]),
        "stages": [asdict(result) for result in results],
        "converter": _converter_bill(start),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(),
    }
    run.write("summary.json", summary)
    changed = changed_parts(recipe.stages)
    save_vlm(
        vlm,
        run.vlm,
        lineage=lineage,
        card=model_card(recipe, summary, lineage),
        encoder_trained=changed.get("encoder") == "full",
        llm_trained=changed.get("llm") == "full",
    )
    write_report(run.path)
    return run.path


def _lineage(recipe: Recipe, start: Start) -> dict[str, Any]:
    return start.source.lineage | {
        "target_llm": recipe.target.llm,
        "initialiser": start.initialisation.name,
        "recipe": recipe.name,
        "recipe_sha256": recipe_hash(recipe),
        "seed": recipe.seed,
        "width_visual": start.vlm.vpg.width,
        "width_llm": start.vlm.llm.width,
        "visual_tokens": start.vlm.vpg.tokens,
    }


def _converter_bill(start: Start) -> dict[str, Any]:
    """What `summary.json` says of the converter: from the chosen row of the table."""
    row = next((row for row in start.table if row.get("chosen")), {})
    return {
        "name": start.initialisation.name,
        "shared_tokens": row.get("pairs"),
        "cosine": row.get("centred_cosine"),
        "recall_at_1": row.get("recall_at_1"),
        "copy_gap_recovered": row.get("copy_gap_recovered"),
        "seconds": start.seconds,
    }


def begin(
    recipe: Recipe,
    *,
    device: torch.device,
    source: Source | None = None,
    train: Mixture | None = None,
    validation: Mixture | None = None,
) -> Start:
    """Open all parts and make the first projector."""
    source = source or open_source(recipe.source.vpg, seed=recipe.seed)
    train = train or open_mixture(recipe.data.train)
    validation = validation or open_mixture(recipe.data.validation)
    llm = open_target(recipe, device=device)
    prompt = _prompt(recipe, source)
    source.vpg.to(device)
    rows = [int(row) for row in np.random.default_rng(0).permutation(len(train))[:SCORING_IMAGES]]
    context = Context(
        source=source.words() if source.words is not None else None,
        target=read_embeddings(recipe.target.llm, trust_remote_code=recipe.target.trust_remote_code),
        projector=source.projector,
        projector_config=_projector_config(recipe, source),
        width_in=source.vpg.width,
        visual_tokens=visual_tokens(source.vpg, train, rows),
        captions=[train.caption(row) for row in rows],
        seed=recipe.seed,
    )

    started = time.perf_counter()
    if recipe.initialiser.kind == "auto":
        held_out = [int(row) for row in np.random.default_rng(2).permutation(len(validation))[:SCORING_IMAGES]]
        scoring = Scoring(
            caption_nll=Splice(llm, prompt).caption_nll,
            visual_tokens=visual_tokens(source.vpg, validation, held_out),
            captions=[validation.caption(row) for row in held_out],
            copy_test=CopyTest(context.source, llm) if context.source is not None else None,
            seed=recipe.seed,
        )
        choice = choose(recipe.initialiser, context, scoring=scoring)
        made, table = choice.initialisation, [row.to_json() for row in choice.rows]
    else:
        made = initialise(recipe.initialiser, context)
        table = [{"name": made.name, "kind": made.kind, "chosen": True, **made.report}]
    seconds = time.perf_counter() - started
    vlm = VLM(source.vpg, made.projector.float().to(device), llm, prompt=prompt)
    return Start(vlm, source, made, table, train, validation, seconds)


def _projector_config(recipe: Recipe, source: Source) -> ProjectorConfig:
    """Of a new projector: the recipe's, else of the source's kind, else the default."""
    if recipe.target.projector is not None:
        return recipe.target.projector
    return source.projector.config.model_copy(update={"tail": False}) if source.projector else ProjectorConfig()


def _prompt(recipe: Recipe, source: Source) -> PromptConfig:
    """The recipe's prompt if it states one, else the source's own."""
    stated = "prompt" in recipe.model_fields_set
    return recipe.prompt if stated or source.prompt is None else source.prompt


def _captions(vlm: VLM, mixture: Mixture, rows: Sequence[int], recipe: Recipe) -> list[str]:
    images = [mixture.image(row) for row in rows]
    return vlm.generate(images, max_new_tokens=recipe.evaluation.max_new_tokens)


def _samples(mixture: Mixture, rows: Sequence[int], before: list[str], after: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": mixture.id(row), "image": _png(mixture.image(row)), "reference": mixture.caption(row),
         "before": was, "after": now}
        for row, was, now in zip(rows, before, after, strict=True)
    ]  # fmt: skip


def _png(image: Any, *, side: int = 160) -> str:
    picture = to_rgb(image)
    picture.thumbnail((side, side))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
