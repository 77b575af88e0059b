"""`plan`: what a recipe will take on machines that one might rent, from configs alone."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from vpgtrans.config import ProjectorConfig
from vpgtrans.data.mixture import open_mixture
from vpgtrans.doctor import cpu_has_bf16
from vpgtrans.errors import DataError, RecipeError, ReferenceError_, UserError
from vpgtrans.flops import StageFlops
from vpgtrans.gpus import Gpu, Rented, parse_gpus
from vpgtrans.isolation import Isolation
from vpgtrans.llm import open_config
from vpgtrans.plan.memory import CPU, GPU, STRATEGIES, Machine, Memory, Standing, Strategy, memory
from vpgtrans.plan.samples import TEXT_TOKENS, Lengths, at_hand
from vpgtrans.plan.skeleton import Rows, skeleton
from vpgtrans.plan.speed import UTILISATION, Load, seconds
from vpgtrans.plan.trace import Passes, Trace
from vpgtrans.recipe import Recipe
from vpgtrans.runs.data import open_prompters
from vpgtrans.runs.parts import outline_of
from vpgtrans.training.config import Stage
from vpgtrans.training.devices import check_batch, check_sharing
from vpgtrans.training.fit import boundary
from vpgtrans.training.fitting import checkpoints
from vpgtrans.vision.importers import Outline
from vpgtrans.vision.vpg import AT_ONCE

_LOGGER = logging.getLogger(__name__)
_CACHED_AT_ONCE, _VALIDATED_AT_ONCE = 16, 32
"""Images that a cache is filled with at a time, and samples of a validation's batch."""


def plan(
    recipe: Recipe,
    gpus: Sequence[str],
    *,
    nodes: int = 1,
    price: float | None = None,
    text_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """What each stage takes under each strategy.

    Args:
        gpus: as `parse_gpus`; several are compared. price: US dollars an hour of one GPU. text_tokens: of an answer, in
            place of what the data has.

    Returns:
        Of every stage, type and strategy: stage, gpus, strategy, fits, memory_bytes (of one GPU, by part), moment,
        device_bytes, micro_batch or pack_tokens, largest (of these that fits), samples_per_second, tokens_per_second,
        hours, gpu_hours, cost, cheapest, note.

    Raises:
        UserError: a type is unknown, or lacks the precision that the recipe asks for (of several: it doesn't fit).
        ReferenceError_, RecipeError: as `validate`.
    """
    rented = [parse_gpus(each, nodes=nodes) for each in gpus]
    if len(rented) == 1 and (lacks := _lacking(recipe, rented[0])):
        raise UserError(f"--gpus {gpus[0]}: {lacks}; right would be trainer.precision=fp32, or another type")
    known = _Known(recipe, text_tokens)
    rows: list[dict[str, Any]] = []
    for index, stage in enumerate(recipe.stages):
        of_stage = [row for where in rented for row in _stage(known, index, stage, where, price=price)]
        fitting = [row for row in of_stage if row["fits"] and row["cost"] is not None]
        for row in of_stage:
            row["cheapest"] = bool(fitting) and row is min(fitting, key=lambda each: (each["cost"], each["hours"]))
        rows += of_stage
    return rows


def _lacking(recipe: Recipe, where: Rented) -> str | None:
    """What the recipe's precision needs and the type doesn't have."""
    if where.gpu is not None and where.gpu.bf16 is None and recipe.trainer.precision.startswith("bf16"):
        return f"{where.name} has no bf16, which trainer.precision: {recipe.trainer.precision} needs"
    return None


def _refused(recipe: Recipe, stage: Stage, strategy: Strategy, devices: int) -> str | None:
    """Why a run would refuse to train this stage so, in its own words."""
    trainer = recipe.trainer.model_copy(update={"strategy": "auto" if strategy == "single" else strategy})
    try:
        check_sharing(recipe.model_copy(update={"trainer": trainer}))
        check_batch(stage.name, stage.batch_size, devices)
    except RecipeError as error:
        return str(error)
    return None


class _Known:
    """What is the same for all machines: shapes and lengths of every stage."""

    def __init__(self, recipe: Recipe, text_tokens: int | None):
        self.recipe = recipe
        self.outline: Outline = outline_of(recipe)
        self.config = open_config(recipe.target.llm, trust_remote_code=recipe.target.trust_remote_code)
        self.lengths = self._lengths(text_tokens)
        self._shapes: dict[tuple[int, torch.dtype, bool], _Shapes] = {}
        for stage, lengths in zip(recipe.stages, self.lengths, strict=True):
            _LOGGER.info("%s: %s", stage.name, lengths.source)

    def _lengths(self, text_tokens: int | None) -> list[Lengths]:
        recipe = self.recipe
        if text_tokens is None and at_hand([*recipe.data.train, *recipe.data.validation]):
            try:
                train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
                prompters = open_prompters(recipe)
                return [Lengths.measured(train, prompter, validation=len(validation)) for prompter in prompters]
            except (DataError, ReferenceError_) as error:
                _LOGGER.warning("samples can't be measured (%s); lengths are assumed", error)
        found = []
        for stage in recipe.stages:
            vpg = self.outline.vpg
            vpg.set_resolution(recipe.resolution_of(stage))
            pieces = 1 if vpg.layouts is None else vpg.layouts.most_pieces
            found.append(Lengths.stated(text_tokens or TEXT_TOKENS, visual=vpg.tokens, pieces=pieces))
        return found

    def shapes(self, index: int, dtype: torch.dtype, *, cpu: bool) -> "_Shapes":
        key = index, dtype, cpu
        if key not in self._shapes:
            self._shapes[key] = _Shapes(self, index, dtype, cpu=cpu)
        return self._shapes[key]


class _Shapes:
    """One stage's passes in one precision, traced."""

    def __init__(self, known: _Known, index: int, dtype: torch.dtype, *, cpu: bool):
        self.recipe = recipe = known.recipe
        self.stage, self.lengths = recipe.stages[index], known.lengths[index]
        self.packing = recipe.data.packing
        # on a GPU padding is counted: a bound from above
        self.unpadded = cpu and recipe.trainer.unpad and not recipe.trainer.compile
        known.outline.vpg.set_resolution(recipe.resolution_of(self.stage))
        projector = recipe.target.projector or ProjectorConfig()
        vlm = skeleton(known.outline.vpg, projector, known.config, dtype=dtype)
        if not cpu and all(each.trainable["encoder"] == "frozen" for each in recipe.stages):
            vlm.vpg.encoder.to(dtype)
        augment = recipe.augmentation(self.stage)
        level, self.cached = boundary(self.stage, augment, native=vlm.vpg.native)
        # fused attention keeps as much as the blocks of a CPU do, without their copies
        isolation = Isolation("blocks") if cpu else Isolation("sdpa")
        self.trace = Trace(vlm, self.stage, level=level, isolation=isolation, trainer=recipe.trainer)
        self.standing = Standing.of(vlm, recipe.trainer, quantise=recipe.target.quantise)
        self.flops = StageFlops(vlm, self.stage.trainable)
        self.forward = StageFlops(vlm, {})
        self.validated = min(
            recipe.trainer.validate_samples or self.lengths.validation or 0, self.lengths.validation or 1 << 60
        )
        self.checkpointed = checkpoints(recipe.trainer, "llm")

    @cached_property
    def _affine(self) -> tuple[Passes, Passes, int]:
        """Passes of one sample and of several: what a sample more adds is the same."""
        several = max(2, min(8, self.stage.batch_size))
        return (
            self.trace.training([self._rows(1)]),
            self.trace.training([self._rows(several)]),
            several,
        )

    def _rows(self, size: int) -> Rows:
        return replace(self.lengths.rows(size), packed=self.unpadded)

    def step(self, size: int) -> Passes:
        """Of an unpacked micro-batch of so many samples."""
        one, more, several = self._affine
        each = {name: (getattr(more, name) - getattr(one, name)) / (several - 1) for name in ("activations", "logits")}
        activations = one.activations + each["activations"] * (size - 1)
        return Passes(int(activations), int(one.logits + each["logits"] * (size - 1)), more.gradients)

    @cached_property
    def packed(self) -> Passes:
        """Of a full pack."""
        return self.trace.training([self._pack])

    @cached_property
    def _pack(self) -> Rows:
        assert self.packing is not None
        return self.lengths.pack(self.packing, self.stage.batch_size)

    @cached_property
    def validation(self) -> Passes:
        return self.trace.validation(self._pack if self.packing else self._rows(_VALIDATED_AT_ONCE))

    @cached_property
    def images(self) -> Passes:
        """Of the frozen front: a cache is filled before, else images pass as they come."""
        return self.trace.frozen(_CACHED_AT_ONCE if self.cached else min(AT_ONCE, self.stage.batch_size))


def _stage(known: _Known, index: int, stage: Stage, where: Rented, *, price: float | None) -> list[dict[str, Any]]:
    """A row a strategy."""
    lacks = _lacking(known.recipe, where)
    peak, dtype = _peak(known.recipe, where)
    shapes = known.shapes(index, dtype, cpu=where.gpu is None)
    strategies: Sequence[Strategy] = STRATEGIES if where.devices > 1 else ("single",)
    return [_row(shapes, where, strategy, price=price, peak=peak, lacks=lacks) for strategy in strategies]


def _peak(recipe: Recipe, where: Rented) -> tuple[float, torch.dtype]:
    """Products a second, and the LLM's dtype."""
    precision = recipe.trainer.precision
    has_bf16 = cpu_has_bf16() if where.gpu is None else where.gpu.bf16 is not None
    half = precision.startswith("bf16") or (precision == "auto" and has_bf16)
    dtype = torch.bfloat16 if half and precision != "bf16-mixed" else torch.float32
    if where.gpu is None:
        return _cpu_peak(torch.bfloat16 if half else torch.float32), dtype
    return (where.gpu.bf16 if half and where.gpu.bf16 else where.gpu.fp32), dtype


def _cpu_peak(dtype: torch.dtype) -> float:
    """Products a second of this machine, by a few of them."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def _row(
    shapes: _Shapes, where: Rented, strategy: Strategy, *, price: float | None, peak: float, lacks: str | None
) -> dict[str, Any]:
    stage, lengths, packing = shapes.stage, shapes.lengths, shapes.packing
    gpu = where.gpu or _this_cpu()
    machine: Machine = GPU if where.gpu else CPU
    devices = 1 if strategy == "single" else where.devices
    share = math.ceil(stage.batch_size / devices)
    stated = min(stage.micro_batch_size or share, share)

    def at(passes: Passes, *, several: bool) -> Memory:
        if several:  # what earlier micro-batches left
            passes = replace(passes, gradients=max(passes.gradients, shapes.standing.gradients))
        rest = {"validation": shapes.validation, "images": shapes.images}
        return memory(shapes.standing, step=passes, strategy=strategy, devices=devices, machine=machine, **rest)

    lacks = lacks or _refused(shapes.recipe, stage, strategy, devices)
    note = lacks
    if packing is not None:
        per_pack = lengths.samples_per_pack(packing, stage.batch_size)
        passes_of_update = max(1, round(stage.batch_size / per_pack / devices))
        found = at(shapes.packed, several=passes_of_update > 1)
        size = packing.max_tokens
        largest = _largest_pack(found, gpu.memory, size)
    else:
        largest = 0
        for candidate in range(share, 0, -1):
            if at(shapes.step(candidate), several=candidate < share).total <= gpu.memory:
                largest = candidate
                break
        size = max(1, min(stated, largest))
        if 0 < largest < stated:
            note = f"micro_batch_size: {size} in place of {stated}"
        passes_of_update = math.ceil(share / size)
        found = at(shapes.step(size), several=passes_of_update > 1)
    fits = found.total <= gpu.memory and lacks is None
    time_of = _time(shapes, strategy, where, gpu, devices=devices, passes=passes_of_update, peak=peak)
    hours = time_of["seconds"] / 3600
    cost_of_hour = price if price is not None else gpu.price
    return {
        "stage": stage.name,
        "gpus": f"{devices}x{where.name}",
        "strategy": strategy,
        "fits": fits,
        "memory_bytes": found.parts,
        "total_bytes": found.total,
        "device_bytes": int(gpu.memory),
        "moment": found.moment,
        "pack_tokens" if packing is not None else "micro_batch": size,
        "largest": largest,
        "samples_per_second": time_of["samples"] / time_of["training"],
        "tokens_per_second": time_of["samples"] * float(lengths.tokens.mean()) / time_of["training"],
        "hours": hours,
        "gpu_hours": hours * devices,
        "cost": None if cost_of_hour is None else hours * devices * cost_of_hour,
        "lengths": lengths.source,
        "note": note,
    }


def _largest_pack(found: Memory, room: float, size: int) -> int:
    """Tokens of the largest pack that fits: what comes and goes is in proportion to them."""
    moving = sum(found.parts.get(name, 0) for name in ("activations", "logits", "allocator"))
    fixed = found.total - moving
    if found.moment != "step" or not moving:
        return size if found.total <= room else 0
    return max(0, int(size * (room - fixed) / moving) // 64 * 64)


def _this_cpu() -> Gpu:
    """This machine as a type: its memory that is free, about 20 GB/s."""
    import psutil

    return Gpu("cpu", psutil.virtual_memory().available, None, 0.0, 20e9, 1e9, None, ())


def _time(
    shapes: _Shapes, strategy: Strategy, where: Rented, gpu: Gpu, *, devices: int, passes: int, peak: float
) -> dict[str, float]:
    """Seconds of a whole stage, and of its training alone; samples."""
    stage, lengths = shapes.stage, shapes.lengths
    samples = stage.budget.samples or math.ceil((stage.budget.tokens or 0) / max(1.0, float(lengths.targets.mean())))
    updates = math.ceil(samples / stage.batch_size)
    batch = _batch(shapes, stage.batch_size)
    flops = shapes.flops.update(
        lengths=batch.lengths, targets=batch.targets, images=batch.pieces,
        encoded=0 if shapes.cached else batch.pieces, checkpointed=shapes.checkpointed,
    )  # fmt: skip
    load = Load(flops / devices, passes)
    where_from: dict[str, Any] = {"gpu": gpu, "peak": peak, "strategy": strategy, "devices": devices}
    training = updates * seconds(load, shapes.standing, nodes=where.nodes, **where_from)

    rate = peak * UTILISATION * devices
    distinct = min(samples, lengths.count or samples) if shapes.cached else 0
    once = distinct * float(lengths.pieces.mean()) * shapes.forward.encoder / rate
    every = stage.validate_every or math.ceil(updates / 10) * stage.batch_size
    times = 1 + math.ceil(updates / max(1, round(every / stage.batch_size)))  # one before the first update
    held_out = shapes.forward.update(
        lengths=batch.lengths, targets=batch.targets, images=batch.pieces, encoded=0 if shapes.cached else batch.pieces
    )
    validations = times * shapes.validated / stage.batch_size * held_out / rate
    return {
        "seconds": training + once + validations,
        "training": training,
        "samples": float(updates * stage.batch_size),
    }


def _batch(shapes: _Shapes, size: int) -> Rows:
    """An update's samples, of average length."""
    lengths = shapes.lengths
    drawn = [int(each) for each in lengths.tokens[:size]]
    while len(drawn) < size:
        drawn += drawn[: size - len(drawn)]
    scale = len(drawn)
    return Rows(drawn, round(float(lengths.targets.mean()) * scale), round(float(lengths.pieces.mean()) * scale))
