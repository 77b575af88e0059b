"""`evaluate`, `caption`, `probe` and `validate`: using what there is, without training."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vpgtrans.config import ConcatEncoderConfig, EncoderConfig, VPGConfig
from vpgtrans.data.config import named_split
from vpgtrans.data.mixture import open_mixture
from vpgtrans.data.sources import check_images
from vpgtrans.errors import DataError, OutputError, RecipeError, TransferError
from vpgtrans.llm import open_config
from vpgtrans.recipe import Recipe, parse_source
from vpgtrans.references import resolve
from vpgtrans.runs.answers import answer, scores
from vpgtrans.runs.parts import (
    check_quantisable,
    check_references,
    check_widths,
    open_vlm,
    outline_of,
    pick_device,
    source_of,
)
from vpgtrans.runs.start import prepare, score_candidates, score_others
from vpgtrans.training.devices import check_sharing, lacks
from vpgtrans.training.fitting import check_fitting
from vpgtrans.vision.importers import importable
from vpgtrans.vlm_directory import load_vision

_LOGGER = logging.getLogger(__name__)


def caption(
    vlm: str,
    images: list[Path],
    *,
    prompt: str | None = None,
    max_new_tokens: int = 32,
    device: str = "auto",
    trust_remote_code: bool = False,
    projector: str | None = None,
    adapter: str | None = None,
    force: bool = False,
) -> list[dict[str, str]]:
    """A caption for each image: `[{"image", "caption"}]`.

    projector, adapter: as of `load_vlm`.

    Raises:
        ReferenceError_, CheckpointError: the VLM. DataError: an image can't be read.
    """
    parts = {"projector": projector, "adapter": adapter}
    opened = open_vlm(vlm, device=device, trust_remote_code=trust_remote_code, force=force, **parts)
    written = opened.generate(list(images), prompt, max_new_tokens=max_new_tokens)
    return [{"image": str(image), "caption": text} for image, text in zip(images, written, strict=True)]


@torch.no_grad()
def evaluate(
    vlm: str,
    *,
    data: list[str],
    keys: Mapping[str, Any] | None = None,
    samples: int | None = None,
    max_new_tokens: int = 32,
    device: str = "auto",
    trust_remote_code: bool = False,
    projector: str | None = None,
    adapter: str | None = None,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """Validation loss, exact match, token F1 and CIDEr on each `DATASET[:SPLIT]`, with `intervals` (95 %, bootstrap).

    Args:
        keys: more of each data source, as in a recipe, such as the names of its columns.
        projector, adapter: as of `load_vlm`.

    Raises:
        DataError: a data set doesn't open. ReferenceError_, CheckpointError: the VLM.
    """
    sets = {}
    for name in data:
        dataset, split = dataset_and_split(name)
        named = {"dataset": dataset, "split": split} | ({"limit": samples} if samples is not None else {})
        sets[name] = open_mixture([parse_source(named | dict(keys or {}))])
    parts = {"projector": projector, "adapter": adapter}
    opened = open_vlm(vlm, device=device, trust_remote_code=trust_remote_code, force=force, **parts)
    found: dict[str, dict[str, Any]] = {}
    for name, mixture in sets.items():
        said = answer(opened, mixture, range(len(mixture)), max_new_tokens=max_new_tokens, with_loss=True)
        if not said.predictions:
            raise DataError(f"{name}: none of its {len(mixture)} samples can be read and asked about")
        found[name] = scores(said)
        for what, count in (("unreadable", said.unreadable), ("dropped", said.dropped)):
            if count:
                found[name][what] = count
    return found


def probe(
    recipe: Recipe,
    *,
    output: Path | None = None,
    device: str = "auto",
    each: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Score every initialiser without training; the row that `auto` would take is marked `chosen`.

    each: called with a row as soon as it is scored, the slow ones last.

    Raises:
        RecipeError: the recipe has no source to transfer.
    """
    if isinstance(recipe.source.vpg, VPGConfig):
        raise RecipeError("source.vpg builds a VPG from scratch; there is nothing to initialise from")
    where = pick_device(device)
    if output is not None and output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; the output must be a directory")
    check_references(recipe)
    train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    # All kinds are tried whichever the recipe takes, its other settings kept.
    tried = recipe.initialiser.model_copy(update={"kind": "auto"})
    data = recipe.data.model_copy(update={"packing": None})  # nothing trains, so no sample need be measured for packs
    recipe = recipe.model_copy(update={"initialiser": tried, "data": data})
    source = source_of(recipe)
    prepared = prepare(recipe, device=where, source=source, train=train)
    choice = score_candidates(recipe, prepared, validation, each=each)
    others = score_others(recipe, prepared, train=train, validation=validation, each=each)
    rows = [row.to_json() for row in [*choice.rows, *others]]
    if output is not None:
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / "initialisers.json").write_text(json.dumps(rows, indent=2) + "\n")
        except OSError as error:
            raise OutputError(f"{output} can't be written: {error.strerror or error}") from error
    return rows


def validate(recipe: Recipe) -> dict[str, Any]:
    """Check that references resolve, data opens and widths fit. Neither LLMs nor encoders are downloaded or loaded.

    Raises:
        ReferenceError_, DataError, TransferError: what doesn't.
    """
    found: dict[str, Any] = {}
    vpg = recipe.source.vpg
    resolved = None if isinstance(vpg, VPGConfig) else resolve(vpg, weights=False)
    if resolved is not None:
        found["source"] = str(resolved.path)
    found["target"] = str(resolve(recipe.target.llm, weights=False).path)
    config = open_config(recipe.target.llm, trust_remote_code=recipe.target.trust_remote_code)
    found["target_model"] = config.get_text_config().model_type
    for role, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        mixture = open_mixture(sources)
        for source in mixture.sources:
            check_images(source)
        found[f"{role}_samples"] = len(mixture)
    outlined = outline_of(recipe)
    if isinstance(vpg, VPGConfig):
        _check_encoder(vpg.encoder)
    elif resolved is not None and resolved.kind != "vlm":
        found["source_model"] = importable(resolved.path)
    else:
        # our own connectors and projectors are a few megabytes, and reading them checks their hashes
        vision = load_vision(vpg, encoder_weights=False)
        _check_encoder(vision.vpg.encoder.config)
        check_widths(vision.vpg, vision.projector)
        found["visual_tokens"] = outlined.visual_tokens
        if recipe.initialiser.kind == "keep":
            width = getattr(config.get_text_config(), "hidden_size", vision.projector.width_out)
            if width != vision.projector.width_out:
                raise TransferError(
                    f"initialiser keep: the projector gives width {vision.projector.width_out}, the target has {width}"
                )
    check_sharing(recipe)
    # The recipe may be right: it may be meant for another machine.
    for problem in lacks(recipe, pick_device("auto")):
        _LOGGER.warning("%s; here it would not train", problem)
    check_quantisable(recipe)
    try:
        check_fitting(recipe, pick_device("auto"))
    except RecipeError as error:
        _LOGGER.warning("%s; here it would not train", error)
    if recipe.target.connector is not None:
        found["visual_tokens"] = outlined.visual_tokens
    return found


def _check_encoder(config: EncoderConfig) -> None:
    """Raises ReferenceError_ where an encoder's reference names nothing."""
    for encoder in config.encoders if isinstance(config, ConcatEncoderConfig) else [config]:
        if encoder.reference is not None:
            resolve(encoder.reference, weights=False)


def dataset_and_split(name: str) -> tuple[str, str]:
    """`openmoji:test` -> (openmoji, test); what is measured on where no split is named."""
    dataset, split = named_split(name)
    return dataset, split or ("validation" if dataset == "openmoji" else "train")
