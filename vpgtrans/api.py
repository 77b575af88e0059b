"""The verbs for Python: as on the command line, with a recipe's path or a `Recipe`, and overrides as a mapping."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpgtrans.errors import RecipeError
from vpgtrans.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from vpgtrans.registry.entry import Entry, Kind
    from vpgtrans.vlm import VLM

RecipeLike = str | Path | Recipe
Overrides = Mapping[str, Any] | Sequence[str]


def _recipe(recipe: RecipeLike, overrides: Overrides) -> Recipe:
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError("overrides go with a recipe's path; this recipe is loaded already")
    return recipe


def transfer(
    recipe: RecipeLike,
    overrides: Overrides = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "auto",
) -> Path:
    """Move a VPG to the recipe's target LLM; returns the run directory.

    overrides: `{"seed": 1, "stages.warmup.budget.samples": 64}` or `["seed=1"]`.

    With `trainer.devices` above 1 the calling script runs once a device, and only the first process evaluates and
    writes: the others return when the training ends, before the run is complete.

    Raises:
        VpgTransError: as on the command line.
    """
    checked = _recipe(recipe, overrides)
    from vpgtrans import runs  # after the checks: it loads torch

    return runs.transfer(
        checked, output=_path(output), resume=resume, overwrite=overwrite, dry_run=dry_run, device=device
    )


def train(
    recipe: RecipeLike,
    overrides: Overrides = (),
    *,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    device: str = "auto",
) -> Path:
    """Train a VPG from scratch with the recipe's target LLM; returns the run directory."""
    checked = _recipe(recipe, overrides)
    from vpgtrans import runs  # after the checks: it loads torch

    return runs.train(checked, output=_path(output), resume=resume, overwrite=overwrite, dry_run=dry_run, device=device)


def compare(
    recipe: RecipeLike,
    overrides: Overrides = (),
    *,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Train from several starts side by side; returns the summary with losses, curves and speed-ups."""
    checked = _recipe(recipe, overrides)
    from vpgtrans import runs  # after the checks: it loads torch

    return runs.compare(
        checked,
        arms=None if arms is None else list(arms),
        seeds=seeds,
        output=_path(output),
        resume=resume,
        overwrite=overwrite,
        device=device,
    )


def probe(
    recipe: RecipeLike, overrides: Overrides = (), *, output: str | Path | None = None, device: str = "auto"
) -> list[dict[str, Any]]:
    """Score every initialiser without training; returns a row each."""
    checked = _recipe(recipe, overrides)
    from vpgtrans import runs  # after the checks: it loads torch

    return runs.probe(checked, output=_path(output), device=device)


def validate(recipe: RecipeLike, overrides: Overrides = ()) -> dict[str, Any]:
    """Check a recipe, its references and widths, without the weights of LLMs and encoders."""
    checked = _recipe(recipe, overrides)
    from vpgtrans import runs  # after the checks: it loads torch

    return runs.validate(checked)


def load(
    vlm: str | Path,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
    projector: str | Path | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
) -> "VLM":
    """Open a VLM directory, a run or `registry:NAME`: `vt.load("runs/quickstart").generate(images)`.

    Args:
        projector, adapter: others in place of its own, such as `registry:NAME` of one that was published alone.
        force: take its LLM even if it is not the one that it, or one of these, was trained with.

    Raises:
        VpgTransError: it doesn't resolve, is damaged, or belongs to another LLM.
    """
    from vpgtrans.runs.parts import open_vlm

    return open_vlm(
        str(vlm),
        device=device,
        trust_remote_code=trust_remote_code,
        projector=_text(projector),
        adapter=_text(adapter),
        force=force,
    )


def publish(
    run: str | Path,
    *,
    to: str | Path,
    index: str | Path | None = None,
    id: str | None = None,
    version: str = "1.0.0",
    kind: "Kind" = "vlm",
    licence: str | Sequence[str] = (),
    description: str | None = None,
    measure: Sequence[str] = (),
    dry_run: bool = False,
    device: str = "auto",
) -> "Entry":
    """Publish a run's result for others, and say so in an index; returns the entry.

    Args:
        to: a directory, oci:HOST/REPO:TAG, hf:ORG/REPO or a URL such as s3://BUCKET/PATH. index: the file that names
            it; that of `VPGTRANS_REGISTRY` or checkpoints_registry.yaml if None.
        kind: `vlm`, or one part: `vpg`, `projector`, `adapter`.
        licence: SPDX for the files, `NAME=SPDX` for data and bases that don't say theirs.
        measure: data sets to measure on, as of `evaluate`; the run's own metrics if none.

    Raises:
        VpgTransError: as on the command line.
    """
    from vpgtrans import runs

    stated = [licence] if isinstance(licence, str) else list(licence)
    return runs.publish(
        run,
        to=to,
        index=index,
        id=id,
        version=version,
        kind=kind,
        licence=stated,
        description=description,
        measure=measure,
        dry_run=dry_run,
        device=device,
    ).entry


def yank(name: str, *, reason: str, index: str | Path | None = None) -> "Entry":
    """Mark an entry `ID@VERSION` of an index as one that should no longer be used; returns it."""
    from vpgtrans.registry import edit

    return edit.yank(name, reason=reason, index=_text(index))[0]


def evaluate(
    vlm: str | Path,
    *,
    data: Sequence[str],
    keys: Mapping[str, Any] | None = None,
    samples: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    projector: str | Path | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Loss and caption metrics of a VLM on data sets (`openmoji:test`); keys: more of each, as in a recipe.

    projector, adapter: as of `load`.
    """
    from vpgtrans import runs

    return runs.evaluate(
        str(vlm),
        data=list(data),
        keys=keys,
        samples=samples,
        device=device,
        trust_remote_code=trust_remote_code,
        projector=_text(projector),
        adapter=_text(adapter),
        force=force,
    )


def caption(
    vlm: str | Path,
    images: Sequence[str | Path],
    *,
    prompt: str | None = None,
    max_new_tokens: int = 32,
    device: str = "auto",
    trust_remote_code: bool = False,
    projector: str | Path | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """A `{"image", "caption"}` for each image; projector, adapter as of `load`."""
    from vpgtrans import runs

    paths = [Path(image) for image in images]
    return runs.caption(
        str(vlm),
        paths,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        projector=_text(projector),
        adapter=_text(adapter),
        force=force,
    )


def _path(output: str | Path | None) -> Path | None:
    return None if output is None else Path(output)


def _text(reference: str | Path | None) -> str | None:
    return None if reference is None else str(reference)
