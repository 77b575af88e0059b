"""`transfer` and `train`: from a recipe to a run directory with a VLM, a summary and a report."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np

from vpgtrans.config import InitialiserConfig, VPGConfig
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.stats import outlook
from vpgtrans.errors import RecipeError
from vpgtrans.memory import forget, overall_peak, start_span
from vpgtrans.processes import first_process
from vpgtrans.progress import data_table
from vpgtrans.recipe import Recipe, recipe_hash
from vpgtrans.report import write_card, write_report
from vpgtrans.runs.answers import Answers, answer, scores
from vpgtrans.runs.directory import RunDirectory, check_run, create_run
from vpgtrans.runs.inputs import INPUTS, check_inputs, inputs_of, to_json
from vpgtrans.runs.parts import check_references, flushed_denormals, pick_device, readable, source_of
from vpgtrans.runs.start import Start, begin, describe, prepare, written_out
from vpgtrans.runs.training import run_stages
from vpgtrans.shortage import shortages_are_said
from vpgtrans.training.checkpoints import Clock
from vpgtrans.training.devices import check_devices
from vpgtrans.training.fitting import check_fitting
from vpgtrans.training.parts import changed_parts
from vpgtrans.training.stopping import end_with_first_process
from vpgtrans.vision.preprocess import thumbnail
from vpgtrans.vlm_directory import save_vlm

_LOGGER = logging.getLogger(__name__)
_START = "start.json"
SAMPLES_SHOWN = 24
"""Held-out images in the report."""

MACHINES_OWN = (
    *(f"trainer.{key}" for key in ("devices", "strategy", "threads", "attention", "checkpoint_every", "loggers")),
    *(f"trainer.{key}" for key in ("unpad", "gradient_checkpointing", "compile", "guard.max_skipped")),
    *("data.workers", "data.max_bad_fraction"),
    *("stages.*.micro_batch_size", "stages.*.cache_features", "evaluation", "compare"),
)
"""Keys in which a resumed run may differ: where and how fast it trains, not what."""
BY_CONTENT = (*("data.train.*.dataset", "data.validation.*.dataset", "target.llm", "source.vpg", "trainer.precision"),)
"""Keys that may differ where inputs.json says that they come to the same: data and models lie elsewhere."""


class RunOptions(TypedDict, total=False):
    """Keywords of `transfer` and `train`, as in `vpgtrans.api`; their defaults are `_journey`'s."""

    output: Path | None
    resume: bool
    overwrite: bool
    dry_run: bool
    device: str


def transfer(recipe: Recipe, **options: Unpack[RunOptions]) -> Path:
    """Move a VPG to the recipe's target LLM; returns the run directory. See `vpgtrans.api.transfer`."""
    if isinstance(recipe.source.vpg, VPGConfig):
        raise RecipeError("source.vpg builds a VPG from scratch: that is `vpgtrans train`; transfer takes a reference")
    return _journey(recipe, **options)


def train(recipe: Recipe, **options: Unpack[RunOptions]) -> Path:
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
    return _journey(chosen, **options)


@contextlib.contextmanager
def _goes_on(path: Path) -> Iterator[None]:
    """Where a signal ends the block, say how the run goes on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if first_process():
            _LOGGER.warning("%s is not complete; the same command with --resume goes on with it", path)
        raise


@shortages_are_said("outside of training")
@flushed_denormals()
def _journey(
    recipe: Recipe,
    *,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "auto",
) -> Path:
    clock = Clock()
    forget()
    end_with_first_process()
    path = output or Path("runs") / recipe.name
    known = (path / INPUTS).is_file()
    free = MACHINES_OWN + (BY_CONTENT if known else ())
    check_run(recipe, path, resume=resume, overwrite=overwrite, may_differ=free)
    run = RunDirectory(path)
    where = pick_device(device)
    check_devices(recipe, where)
    check_fitting(recipe, where)
    # Everything that the user may have got wrong is opened before a file of the run is written: the cheap things first.
    check_references(recipe)
    train_data, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    inputs = inputs_of(recipe, train_data, validation, device=where) if first_process() and not dry_run else {}
    if resume and known:
        check_inputs(path, run.read(INPUTS) or {}, inputs)
    _LOGGER.info("opening the source %s and the target %s", _named(recipe.source.vpg), recipe.target.llm)
    source = source_of(recipe)
    prepared = prepare(recipe, device=where, source=source, train=train_data)
    recipe = written_out(recipe, source)
    _LOGGER.info("%s", data_table(outlook(train_data, prepared.prompter, seed=recipe.seed)))
    if dry_run:
        describe(recipe, prepared, validation)
        _LOGGER.info("dry run: nothing was trained or written")
        return path
    start = begin(recipe, prepared, validation, earlier=run.read(_START) if resume else None)
    del prepared  # the embedding tables of both LLMs: gigabytes that training has no use for
    with run.owned(), _goes_on(path), run.status:
        if not resume:
            check_run(recipe, path, resume=False, overwrite=overwrite)  # another process may have begun one meanwhile
        create_run(recipe, path, resume=resume, inputs=to_json(inputs))
        run.status.begin(path)
        run.write("initialisers.json", start.table)
        run.write(_START, start.to_json())
        _train_and_show(recipe, run, start, train_data, validation, resume=resume, clock=clock)
    return path


def _train_and_show(
    recipe: Recipe,
    run: RunDirectory,
    start: Start,
    train_data: Mixture,
    validation: Mixture,
    *,
    resume: bool,
    clock: Clock,
) -> None:
    """The stages, and what they came to."""
    vlm = start.vlm
    order = np.random.default_rng(1).permutation(len(validation))[:SAMPLES_SHOWN]
    shown, _ = readable(validation, [int(row) for row in order])
    first = first_process()
    length = recipe.evaluation.max_new_tokens
    before = answer(vlm, validation, shown if first else [], max_new_tokens=length)
    lineage = _lineage(recipe, start)
    run.write("lineage.json", lineage)
    results = run_stages(
        vlm,
        recipe,
        run,
        train=train_data,
        validation=validation,
        resume=resume,
        initial_seconds=start.seconds,
        clock=clock,
    )
    lineage["visual_tokens"] = vlm.vpg.tokens  # of the last stage
    run.write("lineage.json", lineage)
    start_span()  # what comes now is no stage's
    if not first:
        return  # it was started to train along; the rest is the first one's
    after = answer(vlm, validation, before.rows, max_new_tokens=length)
    run.write("samples.json", _samples(validation, before, after))
    scored = range(min(recipe.evaluation.samples, len(validation)))
    said = answer(vlm, validation, scored, max_new_tokens=length)
    summary = {
        "name": recipe.name,
        "initialiser": start.initialisation.name,
        "val_loss": results[-1].val_loss,
        "metrics": scores(said),
        "stages": [asdict(result) for result in results],
        "converter": _converter_bill(start),
        **({} if start.source.taken is None else {"connector": start.source.taken.to_json()}),
        "seconds": clock(),
        "peak_memory_bytes": max(overall_peak(), *(result.peak_memory_bytes for result in results)),
    }
    changed = changed_parts(recipe.stages)
    save_vlm(
        vlm,
        run.vlm,
        lineage=lineage,
        encoder_trained="encoder" in changed,
        llm_trained=changed.get("llm") == "full",
    )
    run.write("summary.json", summary)  # what has one has its model
    write_report(run.path)
    write_card(run.path)


def _named(vpg: str | VPGConfig) -> str:
    return vpg if isinstance(vpg, str) else f"from scratch ({vpg.encoder.kind}, {vpg.connector.kind})"


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
        "memory_bytes": start.memory,
    }


def _samples(mixture: Mixture, before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Samples with a picture for the report."""
    rows, images = readable(mixture, after.rows)
    pictures = dict(zip(rows, images, strict=True))
    return [
        {
            "id": mixture.id(row),
            "image": thumbnail(pictures[row]),
            "reference": right[0],
            "before": was,
            "after": now,
        }
        for row, right, was, now in zip(
            after.rows, after.references, before.predictions, after.predictions, strict=True
        )
    ]
