"""Opening what a recipe names: the source's VPG, the target LLM, the data."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from vpgtrans.config import PromptConfig, VPGConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.doctor import cpu_has_bf16
from vpgtrans.errors import DataError, RecipeError, TransferError
from vpgtrans.fingerprint import check_base
from vpgtrans.llm import LanguageModel, WordEmbeddings, linears_of, open_config, open_llm, read_embeddings
from vpgtrans.processes import local_rank
from vpgtrans.projector import Projector
from vpgtrans.prompts import check_attention
from vpgtrans.quantise import check_quantisation
from vpgtrans.recipe import Recipe
from vpgtrans.references import pinned, resolve
from vpgtrans.training.config import TrainerConfig
from vpgtrans.training.loggers import check_loggers
from vpgtrans.transfer.connector import TakenOver, exchange
from vpgtrans.vision.importers import Outline, import_source, outline_source
from vpgtrans.vision.vpg import VPG, build_vpg
from vpgtrans.vlm import VLM
from vpgtrans.vlm_directory import load_vision, load_vlm

_LOGGER = logging.getLogger(__name__)


@dataclass
class Source:
    """Where the VPG comes from. `projector` and `words` are None for a VPG that is built from scratch."""

    vpg: VPG
    projector: Projector | None
    words: Callable[[], WordEmbeddings] | None
    prompt: PromptConfig | None
    lineage: dict[str, Any]
    taken: TakenOver | None = None
    """What a connector that took the source's place has of it."""


def source_of(recipe: Recipe) -> Source:
    """The recipe's source, with the target's connector where the recipe names one.

    Raises:
        As `open_source`, and TransferError, RecipeError: its parts don't fit each other, or the new connector.
    """
    stated = recipe.source
    source = open_source(stated.vpg, seed=recipe.seed, trust_remote_code=stated.trust_remote_code, force=stated.force)
    check_widths(source.vpg, source.projector)
    if recipe.target.connector is None:
        return source
    source.vpg, source.taken = _exchanged(recipe, source.vpg)
    source.lineage["connector"] = source.taken.to_json()
    _LOGGER.info("connector: %s", source.taken.line)
    if source.taken.new and all(stage.trainable["connector"] == "frozen" for stage in recipe.stages):
        _LOGGER.warning("target.connector: %s is random and no stage trains it", ", ".join(source.taken.new))
    return source


def _exchanged(recipe: Recipe, vpg: VPG) -> tuple[VPG, TakenOver]:
    """A source's VPG with the target's connector, where the recipe names one; RecipeError where it doesn't fit."""
    if recipe.target.connector is None:
        return vpg, TakenOver()
    kind, width = recipe.initialiser.kind, vpg.width
    vpg, taken = exchange(vpg, recipe.target.connector, seed=recipe.seed)
    if vpg.width != width and kind not in ("random", "inherit"):
        raise RecipeError(
            f"target.connector: its tokens have width {vpg.width}, and the source's projector, which initialiser "
            f"{kind} moves, takes {width}; right would be a connector of that width, or initialiser: inherit, which "
            "makes a new projector"
        )
    return vpg, taken


def open_source(vpg: str | VPGConfig, *, seed: int, trust_remote_code: bool = False, force: bool = False) -> Source:
    """Open a VLM directory, run or registry entry of ours, or import a BLIP-2 or LLaVA directory, or build a VPG.

    force: read its words even if its LLM is not the one that it was trained with.

    Raises:
        ReferenceError_: it doesn't resolve. CheckpointError, IntegrityError: it is damaged.
    """
    if isinstance(vpg, VPGConfig):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = build_vpg(vpg)
        return Source(built.eval(), None, None, None, {"source_vpg": None, "source_llm": None})
    found = resolve(vpg)
    if found.kind == "vlm":
        vision = load_vision(vpg)
        llm = vision.fingerprint.reference
        lineage: dict[str, Any] = {"source_vpg": vpg, "source_llm": llm, "parent": vision.manifest["lineage"]}

        def words() -> WordEmbeddings:
            # an LLM that was trained in full has words of its own, which lie beside the VPG
            trained = vision.manifest["llm"]["trained"]
            base = pinned(llm, vision.fingerprint.revision)
            read = read_embeddings(str(found.path / "llm") if trained else base, trust_remote_code=trust_remote_code)
            forced = check_base(vision.fingerprint, read.fingerprint, where=vpg, force=force)
            if forced:
                lineage["forced"] = forced
            return read

        return Source(vision.vpg, vision.projector, words, vision.prompt, lineage)
    imported = import_source(found.path, reference=vpg)
    return Source(
        imported.vpg,
        imported.projector,
        lambda: read_embeddings(vpg, trust_remote_code=trust_remote_code),
        imported.prompt,
        {"source_vpg": vpg, "source_llm": imported.source_llm},
    )


def outline_of(recipe: Recipe) -> Outline:
    """Shapes and prompt of a recipe's source, with the target's connector where the recipe names one; neither an
    encoder's weights nor an LLM are loaded. It sees images as the first stage does.

    Raises:
        As `source_of`.
    """
    outline = open_outline(recipe.source.vpg)
    with torch.device("meta"):
        vpg, _ = _exchanged(recipe, outline.vpg.to("meta"))
    set_resolution(vpg, recipe)
    check_attention(prompt_of(recipe, outline.prompt), vpg.layouts)
    return replace(outline, vpg=vpg)


def open_outline(vpg: str | VPGConfig) -> Outline:
    """Shapes and prompt of what `open_source` opens; errors as there."""
    if isinstance(vpg, VPGConfig):
        with torch.device("meta"):
            return Outline(build_vpg(vpg, load_weights=False), None)
    found = resolve(vpg, weights=False)
    if found.kind == "vlm":
        vision = load_vision(vpg, encoder_weights=False)
        return Outline(vision.vpg, vision.prompt)
    return outline_source(found.path, reference=vpg)


def set_resolution(vpg: VPG, recipe: Recipe) -> None:
    """Check what the stages state of resolution; the VPG is left as the first one sees images.

    Raises:
        RecipeError: the VPG can't see so, or a stage asks for what doesn't go with it.
    """
    for stage in reversed(recipe.stages):
        try:
            vpg.set_resolution(recipe.resolution_of(stage))
        except RecipeError as error:
            raise RecipeError(f"stage {stage.name}: {error}") from error
        fit = vpg.encoder.config.image.fit
        if "words" in stage.losses and vpg.layouts is not None:
            raise RecipeError(
                f"stage {stage.name}: losses.words puts a caption's words on the prompts of one square; it does not "
                f"go with fit: {fit}"
            )
        if stage.cache_features is True and vpg.native:
            raise RecipeError(
                f"stage {stage.name}: cache_features: true needs images of one shape; it does not go with fit: {fit}"
            )


def prompt_of(recipe: Recipe, source: PromptConfig | None) -> PromptConfig:
    """What the recipe states of a prompt, and for the rest the source's own."""
    stated = {} if recipe.prompt is None else recipe.prompt.model_dump(include=recipe.prompt.model_fields_set)
    return (source or PromptConfig()).model_copy(update=stated)


def fresh_connector(vpg: VPG, *, seed: int) -> VPG:
    """The same encoder with a connector of the same shape and random weights: what `scratch` starts from.

    What was measured of the encoder's patches stays.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        connector = vpg.fresh_connector()
    for name, buffer in connector.named_buffers():
        buffer.copy_(vpg.connector.get_buffer(name))
    return VPG(vpg.encoder, connector).eval()


def open_target(recipe: Recipe, *, device: torch.device) -> LanguageModel:
    """The target LLM in the precision of the recipe's trainer."""
    return open_llm(
        recipe.target.llm,
        dtype=llm_dtype(recipe.trainer, device),
        device=device,
        trust_remote_code=recipe.target.trust_remote_code,
        quantise=recipe.target.quantise,
    )


def open_vlm(
    reference: str,
    *,
    device: str,
    trust_remote_code: bool = False,
    projector: str | None = None,
    adapter: str | None = None,
    force: bool = False,
) -> VLM:
    """A VLM to use; its LLM is in bf16 where the device is fast in it, else in float32. The rest as `load_vlm`.

    Raises:
        TransferError: the device isn't there. The rest as `load_vlm`.
    """
    where = pick_device(device)
    dtype = llm_dtype(TrainerConfig(), where)
    vlm = load_vlm(
        reference,
        dtype=dtype,
        device=where,
        trust_remote_code=trust_remote_code,
        projector=projector,
        adapter=adapter,
        force=force,
    )
    if where.type == "cuda":
        vlm.vpg.encoder.to(dtype)  # as where it was trained
    return vlm


def llm_dtype(trainer: TrainerConfig, device: torch.device) -> torch.dtype:
    """bf16-true keeps the frozen LLM in bf16; what trains is float32 in every precision."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    if trainer.precision == "bf16-true" or (trainer.precision == "auto" and fast):
        return torch.bfloat16
    return torch.float32


def encoder_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """Of an encoder that is frozen in all stages the LLM's on a GPU, else float32: a CPU gains little from less."""
    frozen = all(stage.trainable["encoder"] == "frozen" for stage in recipe.stages)
    return llm_dtype(recipe.trainer, device) if frozen and device.type == "cuda" else torch.float32


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a device; of several processes each gets a GPU of its own.

    Raises:
        TransferError: it isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank() > 0:
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TransferError(f"--device {name}: unknown; right would be auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise TransferError(f"--device {name}: unknown; right would be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TransferError(f"--device {name}: this machine has no usable GPU (see `vpgtrans doctor`)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise TransferError(f"--device {name}: this machine's GPUs are cuda:0 to cuda:{last}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TransferError("--device mps: this machine has no Apple GPU that torch can use")
    return device


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Within the block the CPU takes denormal numbers for zero, and does as before afterwards.

    Moments of the optimizer decay into denormal numbers, on which a CPU is some twenty times slower. New threads
    inherit the setting, so the block begins before the first parallel operation.
    """
    before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def check_widths(vpg: VPG, projector: Projector | None) -> None:
    """Raises TransferError if a source's VPG and projector do not belong together."""
    if projector is not None and projector.width_in != vpg.width:
        raise TransferError(
            f"source.vpg: the VPG gives tokens of width {vpg.width}, its projector takes {projector.width_in}: "
            "they do not belong together"
        )


def check_references(recipe: Recipe) -> None:
    """Resolve what a recipe names and read the target's config, before anything large is loaded.

    Raises:
        RecipeError: a package that a logger needs is missing.
        ReferenceError_: it doesn't resolve, or the target is no causal LLM. IntegrityError: a checksum differs.
        RecipeError: the target can't be quantised as the recipe says.
    """
    check_loggers(recipe.trainer.loggers)
    open_config(recipe.target.llm, trust_remote_code=recipe.target.trust_remote_code)
    check_quantisable(recipe)
    if isinstance(recipe.source.vpg, str):
        resolve(recipe.source.vpg, weights=False)


def check_quantisable(recipe: Recipe) -> None:
    """Raises RecipeError where the target's layers can't be quantised as the recipe says; no weights are read."""
    target = recipe.target
    if target.quantise is not None:
        blocks, _ = linears_of(target.llm, trust_remote_code=target.trust_remote_code)
        check_quantisation(target.quantise, blocks)


def readable(mixture: Mixture, rows: Iterable[int]) -> tuple[list[int], list[Image.Image]]:
    """Those of the given rows that have an image which can be read, and their first images.

    Damaged ones are for those to report who train on them.
    """
    kept: list[int] = []
    images: list[Image.Image] = []
    for row in rows:
        source, index = mixture.locate(int(row))
        try:
            sample = source.sample(index)
            opened = source.open(replace(sample, images=sample.images[:1]))
        except DataError as error:
            _LOGGER.debug("skipped: %s", error)
        else:
            kept += [row] * len(opened)
            images += opened
    return kept, images


@torch.no_grad()
def measure_inputs(vpg: VPG, mixture: Mixture, rows: Sequence[int], *, count: int) -> None:
    """Have a new connector measure the patches of `count` images among some samples, if it is made for that.

    Raises:
        DataError: none is readable.
    """
    if vpg.connector.mean is not None:
        features, _ = _through(vpg.encode, vpg, mixture, rows, count)
        vpg.connector.measure(features.to(vpg.connector.mean.device))


@torch.no_grad()
def visual_tokens(vpg: VPG, mixture: Mixture, rows: Sequence[int], *, count: int) -> tuple[torch.Tensor, list[int]]:
    """Visual tokens [n, T, d_vpg] of the first images of `count` among some samples, float32 on the CPU; and which.

    Raises:
        DataError: none is readable.
    """
    return _through(vpg, vpg, mixture, rows, count)


def _through(
    compute: Callable[[torch.Tensor], torch.Tensor], vpg: VPG, mixture: Mixture, rows: Sequence[int], count: int
) -> tuple[torch.Tensor, list[int]]:
    parameter = next(vpg.parameters())
    found: list[torch.Tensor] = []
    kept: list[int] = []
    for start in range(0, len(rows), 16):
        some, images = readable(mixture, rows[start : start + 16])
        some, images = some[: count - len(kept)], images[: count - len(kept)]
        if some:
            pixels = torch.stack([vpg.transform(image) for image in images])
            found.append(compute(pixels.to(parameter.device, parameter.dtype)).float().cpu())
            kept += some
        if len(kept) == count:
            break
    if not found:
        names = ", ".join(mixture.id(row) for row in rows[:5])
        raise DataError(
            f"none of {len(rows)} images can be read, or there are none (samples {names}, …); look at `image` of the "
            "data set"
        )
    return torch.cat(found), kept
