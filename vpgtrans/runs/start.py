"""Before the first update: the parts opened, the first projector made, its rivals scored."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vpgtrans.config import InitialiserConfig, ProjectorConfig, PromptConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.packs import measure
from vpgtrans.errors import DataError
from vpgtrans.llm import LanguageModel, embeddings_of
from vpgtrans.memory import span_peak, start_span
from vpgtrans.progress import trainable_table
from vpgtrans.prompts import Prompter
from vpgtrans.recipe import Recipe
from vpgtrans.runs.parts import (
    Source,
    encoder_dtype,
    fresh_connector,
    measure_inputs,
    open_target,
    prompt_of,
    set_resolution,
    visual_tokens,
)
from vpgtrans.training.devices import world_size
from vpgtrans.training.draws import pack_draws
from vpgtrans.training.fitting import check_blocks
from vpgtrans.training.parts import check_stages, set_trainable, table
from vpgtrans.transfer.converters import fit
from vpgtrans.transfer.initialisers import Context, Initialisation, initialise
from vpgtrans.transfer.probe import Choice, ProbeRow, Scoring, choose, probe, slow_candidates
from vpgtrans.transfer.scores import CopyTest, word_scores
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM, Splice

_LOGGER = logging.getLogger(__name__)

SCORING_IMAGES = 96
"""Images on which an initialiser is calibrated, and as many held-out ones on which it is scored."""


Each = Callable[[dict[str, Any]], None] | None
"""What is called with each row of the table as soon as it is scored."""


@dataclass
class Prepared:
    """All that is open before a projector for the target exists."""

    source: Source
    llm: LanguageModel
    prompt: PromptConfig
    context: Context
    device: torch.device

    @property
    def prompter(self) -> Prompter:
        """What the run makes token ids with."""
        vpg = self.source.vpg
        return Splice(self.llm, self.prompt, visual_tokens=vpg.tokens, layouts=vpg.layouts).prompter


@dataclass
class Start:
    """A VLM before its first update, and how it came about."""

    vlm: VLM
    source: Source
    initialisation: Initialisation
    table: list[dict[str, Any]]
    """Rows of initialisers.json."""
    seconds: float
    """Of the initialiser, its scoring included where it is `auto`: part of the bill."""
    memory: int
    """Its peak in bytes, of the whole process."""

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs to begin the same way without scoring anything again."""
        config = self.initialisation.config.model_dump(mode="json")
        return {"initialiser": config, "seconds": self.seconds, "memory_bytes": self.memory, "table": self.table}


def prepare(recipe: Recipe, *, device: torch.device, source: Source, train: Mixture) -> Prepared:
    """Open the target LLM and gather what initialisers may use.

    Raises:
        ReferenceError_, CheckpointError, TransferError: what doesn't open or doesn't fit.
    """
    set_resolution(source.vpg, recipe)
    llm = open_target(recipe, device=device)
    check_stages(recipe.stages, source.vpg, llm.model)
    check_blocks(recipe.trainer, source.vpg)
    source.vpg.to(device)
    if source.vpg.encoder.reference_sha256 is not None:  # one that the VLM carries itself is written back as it was
        source.vpg.encoder.to(encoder_dtype(recipe, device))
    if source.projector is None or (source.taken is not None and "mean" in source.taken.new):
        measure_inputs(source.vpg, train, _sample(train), count=SCORING_IMAGES)
    prompt = prompt_of(recipe, source.prompt)
    splice = Splice(llm, prompt, visual_tokens=source.vpg.tokens, layouts=source.vpg.layouts)
    _check_rows(recipe, splice, source.vpg, train, device)
    tokens, rows = visual_tokens(source.vpg, train, _sample(train), count=SCORING_IMAGES)
    # What starts at random needs no source LLM, so it need not be there.
    words = source.words if recipe.initialiser.kind not in ("random", "inherit") else None
    # Of another width it can't be moved, and `source_of` let pass only what makes a new one.
    fits = source.projector is not None and source.projector.width_in == source.vpg.width
    context = Context(
        source=words() if words is not None else None,
        target=embeddings_of(llm, trust_remote_code=recipe.target.trust_remote_code),
        projector=source.projector if fits else None,
        projector_config=_projector_config(recipe, source),
        width_in=source.vpg.width,
        visual_tokens=tokens,
        captions=[train.caption(row) for row in rows],
        seed=recipe.seed,
    )
    return Prepared(source, llm, prompt, context, device)


def _check_rows(recipe: Recipe, splice: Splice, vpg: VPG, train: Mixture, device: torch.device) -> None:
    """Check every stage's rows; the VPG is left as the first stage sees images.

    Raises:
        RecipeError: the LLM's attention can't do what packing or the prompt asks of it, or devices can't share packs.
        DataError: no sample fits a pack.
    """
    packing = recipe.data.packing
    if packing is not None or splice.both_ways:
        splice.isolate(recipe.trainer.attention, longest=packing.max_tokens if packing else None)
    if packing is not None:
        for index, stage in reversed(list(enumerate(recipe.stages))):
            vpg.set_resolution(recipe.resolution_of(stage))
            splice.lay_out(splice.prompter.config, visual_tokens=vpg.tokens, layouts=vpg.layouts)
            lengths = measure(train, splice.prompter)
            draws = pack_draws(train, lengths, packing, stage, seed=recipe.seed, index=index)
            draws.check(world_size(recipe, device))


def score_candidates(recipe: Recipe, prepared: Prepared, validation: Mixture, *, each: Each = None) -> Choice:
    """Make and score the initialisers that the context allows; the one that `auto` takes is marked."""
    return choose(recipe.initialiser, prepared.context, scoring=_scoring(recipe, prepared, validation, each))


def score_others(
    recipe: Recipe, prepared: Prepared, *, train: Mixture, validation: Mixture, each: Each = None
) -> list[ProbeRow]:
    """Rows of what `auto` doesn't try: the slow converters, and `random` behind a connector with random weights."""
    config, context = recipe.initialiser, prepared.context
    slow = slow_candidates(config, context)
    vpg = fresh_connector(prepared.source.vpg, seed=recipe.seed).to(prepared.device)
    fresh = replace(prepared, source=replace(prepared.source, vpg=vpg))
    tokens, rows = visual_tokens(vpg, train, _sample(train), count=SCORING_IMAGES)
    context = replace(context, visual_tokens=tokens, captions=[train.caption(row) for row in rows])
    random = config.model_copy(update={"kind": "random"})
    found = probe([random], context, scoring=_scoring(recipe, fresh, validation, each))
    found += probe(slow, prepared.context, scoring=_scoring(recipe, prepared, validation, each))
    return [row for row, _ in found]


def _sample(train: Mixture) -> list[int]:
    """Samples among which are the images on which initialisers are calibrated; not all may have one."""
    return train.some(8 * SCORING_IMAGES, seed=0)


def _scoring(recipe: Recipe, prepared: Prepared, validation: Mixture, each: Each = None) -> Scoring:
    context = prepared.context
    common: dict[str, Any] = {
        "copy_test": CopyTest(context.source, prepared.llm) if context.source is not None else None,
        "seed": recipe.seed,
        "each": (lambda row: each(row.to_json())) if each is not None else None,
    }
    # Every image as one square, also where a run cuts it into tiles.
    splice = Splice(prepared.llm, prepared.prompt, visual_tokens=prepared.source.vpg.tokens)
    rows = [row for row in validation.some(8 * SCORING_IMAGES, seed=2) if _of_one_image(validation, row, splice)]
    if not rows:
        return Scoring(**common)
    tokens, held_out = visual_tokens(prepared.source.vpg, validation, rows, count=SCORING_IMAGES)
    captions = [validation.sample(row).text for row in held_out]
    return Scoring(caption_nll=splice.caption_nll, visual_tokens=tokens, captions=captions, **common)


def _of_one_image(mixture: Mixture, row: int, splice: Splice) -> bool:
    """Whether a sample is well-formed and, as far as the LLM takes it, has one image."""
    try:
        return splice.prompter.encode(mixture.sample(row).text).images == 1
    except DataError:
        return False


def begin(recipe: Recipe, prepared: Prepared, validation: Mixture, *, earlier: dict[str, Any] | None = None) -> Start:
    """Make the first projector and join the parts.

    earlier: `Start.to_json` of the run that is resumed; what it chose is taken, and its bill kept.

    Raises:
        TransferError: the initialiser can't be made from what there is; the tokenizers share too few tokens.
    """
    started = time.perf_counter()
    start_span()
    if earlier is not None:
        made = initialise(InitialiserConfig.model_validate(earlier["initialiser"]), prepared.context)
        table, seconds, memory = earlier["table"], earlier["seconds"], earlier["memory_bytes"]
    elif recipe.initialiser.kind == "auto":
        if prepared.context.source is not None:
            prepared.context.pairs()  # raises: quietly taking `inherit` is not what a transfer was asked for
        choice = score_candidates(recipe, prepared, validation)
        made, table = choice.initialisation, [row.to_json() for row in choice.rows]
        seconds, memory = time.perf_counter() - started, span_peak()
    else:
        made = initialise(recipe.initialiser, prepared.context)
        seconds, memory = time.perf_counter() - started, span_peak()
        quality = _word_quality(recipe.initialiser, prepared.context)
        table = [{"name": made.name, "kind": made.kind, "chosen": True, **made.report, **quality}]
    note = f" ({made.report['note']})" if made.report.get("note") else ""
    _LOGGER.info("first projector: %s%s, %.1f s", made.name, note, seconds)
    projector = made.projector.float().to(prepared.device)
    vlm = VLM(prepared.source.vpg, projector, prepared.llm, prompt=prepared.prompt)
    return Start(vlm, prepared.source, made, table, seconds, memory)


def describe(recipe: Recipe, prepared: Prepared, validation: Mixture) -> None:
    """Say what a run would do, with everything joined: the trainable table and the length of every stage.

    Raises:
        TransferError: as `begin`.
    """
    source, llm = prepared.source, prepared.llm
    if recipe.initialiser.kind == "auto":
        kind = "random" if prepared.context.source is None else "converter"
        _LOGGER.info("initialiser auto is not scored in a dry run, which takes minutes; joined with %s", kind)
        recipe = recipe.model_copy(update={"initialiser": recipe.initialiser.model_copy(update={"kind": kind})})
    vlm = begin(recipe, prepared, validation).vlm
    _LOGGER.info(
        "%d visual tokens of width %d into %s, width %d", source.vpg.tokens, source.vpg.width, llm.reference, llm.width
    )
    for stage in recipe.stages:
        vlm.set_resolution(recipe.resolution_of(stage))
        budget = f"{stage.budget.samples:,} samples" if stage.budget.samples else f"{stage.budget.tokens:,} tokens"
        seen = f"{vlm.vpg.tokens} visual tokens of {vlm.vpg.encoder.config.image.size} pixels"
        _LOGGER.info("stage %s: %s in batches of %d, %s", stage.name, budget, stage.batch_size, seen)
        set_trainable(vlm, stage)
        _LOGGER.info("%s", trainable_table(table(vlm, stage)))


def _word_quality(config: InitialiserConfig, context: Context) -> dict[str, float]:
    """How well the converter carries words that it was not fitted on, from a second fit that is not on the bill."""
    if config.kind not in ("converter", "caption-fit"):
        return {}
    train, test = context.pairs().split(seed=context.seed)
    converter = fit(config, *context.rows(train), anchors=context.source_prompts())
    scores = word_scores(converter, *context.rows(test))
    return {
        "centred_cosine": scores.centred_cosine,
        "recall_at_1": scores.recall_at_1,
        "norm_ratio": scores.norm_ratio,
    }


def _projector_config(recipe: Recipe, source: Source) -> ProjectorConfig:
    """Of a new projector: the recipe's, else of the source's kind, else the default."""
    if recipe.target.projector is not None:
        return recipe.target.projector
    return source.projector.config.model_copy(update={"tail": False}) if source.projector else ProjectorConfig()


def written_out(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with its prompt and connector written out: what it states, and for the rest the source's own."""
    target = recipe.target
    if target.connector is not None:
        own = source.vpg.connector.config.model_copy(update={"limit": source.vpg.own.limit})  # no stage's
        target = target.model_copy(update={"connector": own})
    return recipe.model_copy(update={"prompt": prompt_of(recipe, source.prompt), "target": target})
