"""`compare`: the same target, data order, seeds and validation set from several starts. What did a transfer save?

scratch     the encoder as it comes, connector and projector random; all budget in the last stage
inherit     the trained VPG, a random norm-matched projector; all budget in the last stage, no warm-up
transfer    the recipe as it stands
others      the recipe with that initialiser

inherit runs the first seed at each of `compare.lr_factors` times the recipe's rates; the better one counts and serves
the other seeds. Every arm sees the same samples in the same order for the same number of samples. With `data.packing`
that holds within a pack's length, and a stage draws packs in an order of its own: two stages then see another sequence
than one of the same length.

A curve holds the losses of stages that see images as the last one does; others are of another kind.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from vpgtrans.config import InitialiserConfig, VPGConfig
from vpgtrans.data.mixture import open_mixture
from vpgtrans.errors import RecipeError
from vpgtrans.processes import launched, launcher
from vpgtrans.recipe import ARMS, Recipe
from vpgtrans.report import compare_plot, write_compare_report
from vpgtrans.runs.directory import RunDirectory, check_run, create_run
from vpgtrans.runs.parts import (
    check_references,
    flushed_denormals,
    fresh_connector,
    pick_device,
    source_of,
)
from vpgtrans.runs.start import begin, prepare, written_out
from vpgtrans.runs.training import Interrupted, run_stages
from vpgtrans.training.config import Budget, Stage
from vpgtrans.training.fitting import check_fitting
from vpgtrans.transfer.initialisers import initialise

_LOGGER = logging.getLogger(__name__)

SCRATCH, INHERIT, TRANSFER = "scratch", "inherit", "transfer"
DEFINITIONS = {
    SCRATCH: "the encoder as it comes, connector and projector random; all budget in the fine-tune",
    INHERIT: "the trained VPG, a random norm-matched projector; no warm-up, all budget in the fine-tune, "
    "the better of the tried learning rates",
    TRANSFER: "the recipe as it stands: initialiser, warm-up, fine-tune",
}

_MAY_DIFFER = ("compare.arms", "compare.seeds", "compare.lr_factors")
"""What a resumed comparison may change: a finished arm depends on none of it."""

Curve = list[tuple[int, float]]


@flushed_denormals()
def compare(
    recipe: Recipe,
    *,
    arms: list[str] | None = None,
    seeds: int | None = None,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Run the arms and write summary.json, report.html and curves.png.

    Finished arms of a resumed run are kept by arm, seed and learning rate, so it may have other `arms`, `seeds` and
    `lr_factors` than before: what is missing is added.

    Raises:
        RecipeError: the recipe builds a VPG from scratch, budgets are not in samples, or a rate is left to a range
            test.
    """
    if isinstance(recipe.source.vpg, VPGConfig):
        raise RecipeError("source.vpg builds a VPG from scratch; compare needs a trained one to transfer")
    if any(stage.budget.samples is None for stage in recipe.stages):
        raise RecipeError("stages[].budget: compare counts samples; give every stage budget: {samples: N}")
    if auto := [stage.name for stage in recipe.stages if stage.lr == "auto"]:
        raise RecipeError(
            f"stages.{auto[0]}.lr: auto: compare counts every sample, and those of a range test are on no curve; give "
            "a number (a run of transfer says which rate it picked)"
        )
    arms, count = list(dict.fromkeys(arms or recipe.compare.arms)), seeds or recipe.compare.seeds
    recipe = recipe.model_copy(update={"compare": recipe.compare.model_copy(update={"arms": arms, "seeds": count})})
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise RecipeError(f"compare.arms: no arm {', '.join(unknown)}; known: {', '.join(ARMS)}")
    if launched() not in (None, (1, 1)):
        raise RecipeError(f"compare trains one arm after the other, each in one process; start it without {launcher()}")
    if recipe.trainer.devices != 1:
        # one arm after the other, each alone: seconds and memory of an arm are its own
        recipe = recipe.model_copy(update={"trainer": recipe.trainer.model_copy(update={"devices": 1})})
    path = check_run(recipe, output, resume=resume, overwrite=overwrite, may_differ=_MAY_DIFFER)
    where = pick_device(device)
    check_fitting(recipe, where)
    recipe = _check(recipe, arms, where)
    run = create_run(recipe, path, resume=resume)
    curves: dict[str, list[Curve]] = {}
    figures: dict[str, list[dict[str, Any]]] = {}
    with run.status:
        run.status.begin(path)
        for arm in arms:
            try:
                results = _arm(recipe, arm, count, run, where)
            except Interrupted as stop:
                # finished arms are kept, not this one's half: what goes on is the comparison
                raise Interrupted(stop.exit_code - 128, str(run.path)) from None
            curves[arm] = [[(int(samples), float(loss)) for samples, loss in result["curve"]] for result in results]
            figures[arm] = results
    summary = {
        "name": recipe.name,
        "arms": {
            arm: {
                "val_loss": [min(loss for _, loss in curve) for curve in curves[arm]],
                "final_val_loss": [curve[-1][1] for curve in curves[arm]],
                "curve": _median_curve(curves[arm]),
                "curves": curves[arm],
                "seconds": [result["seconds"] for result in figures[arm]],
                "lr_factor": figures[arm][0]["lr_factor"],
                "initialiser": figures[arm][0]["initialiser"],
            }
            for arm in arms
        },
        "speedup": speedups(curves, SCRATCH, floor=recipe.stages[0].batch_size),
        "speedup_over_inherit": speedups(curves, INHERIT, floor=recipe.stages[0].batch_size),
        "definitions": {arm: DEFINITIONS.get(arm, f"the recipe with initialiser {arm}") for arm in arms},
        "budget": {"samples": _total(recipe)},
        "seeds": count,
    }
    run.write("summary.json", summary)
    compare_plot(summary, run.path / "curves.png")
    write_compare_report(run.path)
    return summary


def _check(recipe: Recipe, arms: list[str], device: torch.device) -> Recipe:
    """Open all that the arms need and make their first projectors, so that nothing is written where one can't be.

    Returns the recipe with its prompt written out.

    Raises:
        UserError, IntegrityError: what an arm would stop at.
    """
    check_references(recipe)
    train, _ = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    source = source_of(recipe)
    configs = [arm_recipe(recipe, arm, seed=recipe.seed, factor=1.0).initialiser for arm in arms]
    moved = [config for config in configs if config.kind not in ("random", "inherit")]
    widest = recipe.model_copy(update={"initialiser": (moved or configs)[0]})
    context = prepare(widest, device=device, source=source, train=train).context
    for config in moved:
        if config.kind == "auto":
            context.pairs()
        else:
            initialise(config, context)
    return written_out(recipe, source)


def speedups(curves: dict[str, list[Curve]], base: str, *, floor: int = 1) -> dict[str, dict[str, Any] | None]:
    """Samples that `base` needed for its best validation loss ÷ samples until an arm first reached it, seed by seed.

    `floor`: an arm that is there before its first update is counted with this many samples. A seed whose arm never
    reaches it counts as 0 in the median and as null in `per_seed`; an arm whose median is 0 is null.
    """
    found: dict[str, dict[str, Any] | None] = {}
    if base not in curves:
        return found
    for arm, runs in curves.items():
        if arm == base:
            continue
        ratios: list[float | None] = []
        for reference, curve in zip(curves[base], runs, strict=True):
            needed, best = min(reference, key=lambda point: point[1])
            reached = next((samples for samples, loss in curve if loss <= best), None)
            ratios.append(None if reached is None else max(needed, floor) / max(reached, floor))
        middle = median(ratio or 0.0 for ratio in ratios)
        reached_by = [ratio for ratio in ratios if ratio is not None]
        found[arm] = (
            {
                "median": middle,
                "min": min(reached_by) if len(reached_by) == len(ratios) else None,
                "max": max(reached_by),
                "per_seed": ratios,
            }
            if middle > 0
            else None
        )
    return found


def arm_recipe(recipe: Recipe, arm: str, *, seed: int, factor: float) -> Recipe:
    """The recipe of one arm and seed."""
    changes: dict[str, Any] = {"seed": seed}
    if arm in (SCRATCH, INHERIT):
        changes["initialiser"] = InitialiserConfig(kind="random" if arm == SCRATCH else "inherit")
        changes["stages"] = [_whole_budget(recipe, factor)]
    elif arm != TRANSFER:
        changes["initialiser"] = recipe.initialiser.model_copy(update={"kind": arm})
    return recipe.model_copy(update=changes)


def _whole_budget(recipe: Recipe, factor: float) -> Stage:
    """The last stage with the budget of all stages, its rates times `factor`."""
    last = recipe.stages[-1]
    assert last.lr != "auto"  # `compare` refuses it
    rate = {part: lr * factor for part, lr in last.lr.items()} if isinstance(last.lr, dict) else last.lr * factor
    return last.model_copy(update={"lr": rate, "budget": Budget(samples=_total(recipe))})


def _total(recipe: Recipe) -> int:
    return sum(stage.budget.samples or 0 for stage in recipe.stages)


def _arm(recipe: Recipe, arm: str, seeds: int, run: RunDirectory, device: torch.device) -> list[dict[str, Any]]:
    """Results of all seeds of an arm; the learning rate is chosen on the first."""
    factors = list(recipe.compare.lr_factors) if arm == INHERIT else [1.0]
    tried = [_one(recipe, arm, recipe.seed, factor, run, device) for factor in factors]
    best = min(tried, key=lambda result: min(loss for _, loss in result["curve"]))
    factor = best["lr_factor"]
    return [best] + [_one(recipe, arm, recipe.seed + k, factor, run, device) for k in range(1, seeds)]


def _one(recipe: Recipe, arm: str, seed: int, factor: float, run: RunDirectory, device: torch.device) -> dict[str, Any]:
    """One arm, one seed, one learning rate; a finished one is read back."""
    name = f"{arm}-seed{seed}" + (f"-lr{factor:g}" if arm in (SCRATCH, INHERIT) else "")
    directory = RunDirectory(run.path / "arms" / name)
    done = directory.path / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    _LOGGER.info("arm %s", name)
    chosen = arm_recipe(recipe, arm, seed=seed, factor=factor)
    source = source_of(chosen)
    if arm == SCRATCH:
        source.vpg = fresh_connector(source.vpg, seed=seed)
    train, validation = open_mixture(chosen.data.train), open_mixture(chosen.data.validation)
    start = begin(chosen, prepare(chosen, device=device, source=source, train=train), validation)
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.metrics.unlink(missing_ok=True)
    directory.status = run.status
    results = run_stages(
        start.vlm,
        chosen,
        directory,
        train=train,
        validation=validation,
        resume=False,
        keep_checkpoints=False,
        initial_seconds=start.seconds,
    )
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    as_last = _as_the_last(chosen)
    curve = {line["samples"]: line["val_loss"] for line in lines if "val_loss" in line and line["stage"] in as_last}
    result = {
        "arm": arm,
        "seed": seed,
        "lr_factor": factor,
        "initialiser": start.initialisation.name,
        "curve": sorted(curve.items()),
        "seconds": start.seconds + sum(stage.seconds for stage in results),
        "initialiser_seconds": start.seconds,
        "stages": [asdict(stage) for stage in results],
    }
    directory.write("result.json", result)
    return result


def _as_the_last(recipe: Recipe) -> set[str]:
    """Names of the stages at the last one's resolution."""
    last = recipe.resolution_of(recipe.stages[-1])
    return {stage.name for stage in recipe.stages if recipe.resolution_of(stage) == last}


def _median_curve(curves: list[Curve]) -> list[list[float]]:
    """Median over seeds, between the first and the last number of samples that every seed reached.

    Packs hold more or fewer samples, so that seeds are validated at other numbers of them: in between a curve is
    straight.
    """
    columns = [np.array(curve).T for curve in curves]
    grid = np.unique([samples for curve in curves for samples, _ in curve])
    grid = grid[(grid >= max(samples[0] for samples, _ in columns)) & (grid <= min(s[-1] for s, _ in columns))]
    values = np.median([np.interp(grid, samples, losses) for samples, losses in columns], axis=0)
    return [[samples, loss] for samples, loss in zip(grid.tolist(), values.tolist(), strict=True)]
