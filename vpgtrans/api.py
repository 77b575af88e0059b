"""The verbs for Python: as on the command line, with a recipe's path, or a recipe as a mapping or a `Recipe`.

Overrides, as a mapping, go with a path.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpgtrans.errors import RecipeError
from vpgtrans.recipe import Recipe, load_recipe, parse_recipe

if TYPE_CHECKING:
    from vpgtrans.data.mixture import Mixture
    from vpgtrans.llm import WordEmbeddings
    from vpgtrans.registry.entry import Entry, Kind
    from vpgtrans.registry.verify import Check
    from vpgtrans.report.read import RunFiles
    from vpgtrans.transfer.converters import AffineConverter
    from vpgtrans.transfer.pairing import TokenPairs
    from vpgtrans.vlm import VLM

RecipeLike = str | Path | Mapping[str, Any] | Recipe
Overrides = Mapping[str, Any] | Sequence[str]


def _recipe(recipe: RecipeLike, overrides: Overrides) -> Recipe:
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError("overrides go with a recipe's path; this recipe is loaded already")
    return recipe if isinstance(recipe, Recipe) else parse_recipe(recipe)


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


def pull(name: str, *, index: str | Path | None = None) -> Path:
    """The directory of an entry `ID[@VERSION]` in the cache: there already, or fetched, every byte checked.

    index: path or URL of the index that names it; those of `VPGTRANS_REGISTRY` and at hand if None.

    Raises:
        VpgTransError: as on the command line.
    """
    from vpgtrans.registry.index import find
    from vpgtrans.registry.pull import pull

    entry, place = find(name.removeprefix("registry:"), index=None if index is None else str(index))
    return pull(entry, index=place)


def verify(
    checkpoint: str | Path,
    *,
    against: str | None = None,
    index: str | Path | None = None,
    trust_remote_code: bool = False,
) -> "list[Check]":
    """Whether an entry, a VLM directory or a run is whole and, with `against`, fits that LLM; a `Check` a question.

    A check is `fine`, or has `problems` that say what differs. Nothing is raised for what they find.

    Raises:
        VpgTransError: the checkpoint can't be had at all.
    """
    from vpgtrans.registry.verify import locate, verify

    directory, entry = locate(str(checkpoint), index=None if index is None else str(index))
    return verify(directory, entry=entry, against=against, trust_remote_code=trust_remote_code)


def quieten() -> None:
    """Keep the advice of torch, transformers, Lightning and others out of a notebook; their errors still show.

    Imports them, since some set their loggers' levels while they are imported. What vpgtrans itself warns of stays.
    """
    from vpgtrans.libraries import quieten

    quieten()
    from vpgtrans import runs  # noqa: F401  # with all that it stands on

    quieten()


def open_data(name: str, keys: Mapping[str, Any] | None = None) -> "Mixture":
    """A data set `DATASET[:SPLIT]` as a sequence: `len`, `.image(i)`, `.caption(i)`; keys: more, as in a recipe.

    Raises:
        DataError: it can't be read, or a key is wrong.
    """
    from vpgtrans.data.mixture import open_mixture
    from vpgtrans.recipe import parse_source
    from vpgtrans.runs.use import dataset_and_split

    dataset, split = dataset_and_split(name)
    return open_mixture([parse_source({"dataset": dataset, "split": split, **(keys or {})})])


def read_run(run: str | Path) -> "RunFiles":
    """What a run directory holds, as plain data: summary, metrics, samples, lineage and more.

    Raises:
        DataError: there is no such run, or it is not complete.
    """
    from vpgtrans.report.read import read_run

    return read_run(Path(run))


def fit_converter(
    source: "WordEmbeddings", target: "WordEmbeddings", *, pairs: "TokenPairs | None" = None, **settings: Any
) -> "AffineConverter":
    """A word converter between the tables of two LLMs, as `vt.read_embeddings` gives them.

    Args:
        pairs: shared tokens to fit on, such as one side of `pairs.split()`; all of `vt.pair_tokens` if None.
        settings: `fit`, `alpha`, `ridge`, `rms_match`, `max_tokens`, as of an initialiser in a recipe.

    Raises:
        RecipeError: a setting is wrong. TransferError: the tokenizers share too few tokens.
    """
    from vpgtrans.config import InitialiserConfig
    from vpgtrans.recipe import parse_settings
    from vpgtrans.transfer.converters import Rows, fit
    from vpgtrans.transfer.pairing import pair_tokens

    config = parse_settings(InitialiserConfig, {"kind": "converter", **settings}, name="fit_converter")
    pairs = pair_tokens(source, target) if pairs is None else pairs
    return fit(config, Rows(source.matrix, pairs.source_ids), Rows(target.matrix, pairs.target_ids))


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
