"""`vpgtrans data pack`: which samples of a recipe's training data share a row, and what an update then holds."""

from typing import Any

from vpgtrans.data.config import PackingConfig
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.packs import LEFT_OUT, Lengths, measure, plan_packs
from vpgtrans.errors import RecipeError
from vpgtrans.recipe import Recipe
from vpgtrans.runs.data import open_prompters
from vpgtrans.training.draws import pack_draws

_SHOWN = 3
"""Samples in no pack that are named, of each kind."""


def data_pack(
    recipe: Recipe, *, max_tokens: int | None = None, max_images: int | None = None, max_samples: int | None = None
) -> dict[str, Any]:
    """Plan packs of all training samples, each once, as the last stage sees them.

    The plan is kept in the cache, for as long as nothing changes.

    Args:
        max_tokens, max_images, max_samples: limits of a pack; None: the recipe's `data.packing`.

    Returns:
        fill, packs, samples, tokens, tokens_per_pack, images_per_pack, samples_per_pack, the limits; dropped: samples
        in no pack, and of them over_long (they alone pass a limit), left_out (by a rule) and bad; named: the first
        of each kind, and why; plan: the file; stages: of each stage packs, samples and tokens of an update, on average.

    Raises:
        ReferenceError_, DataError, RecipeError: the tokenizer, the source or the data don't open, nothing fits, or
            nothing says how large packs are.
    """
    stated = recipe.data.packing
    given = {"max_tokens": max_tokens, "max_images": max_images, "max_samples": max_samples}
    given = {name: limit for name, limit in given.items() if limit is not None}
    if stated is None and max_tokens is None:
        raise RecipeError("data.packing: the recipe has none; give --max-tokens N, or data.packing.max_tokens=N")
    limits = PackingConfig(**(stated.model_dump() if stated else {}) | given)
    mixture, prompters = open_mixture(recipe.data.train), open_prompters(recipe)
    lengths = measure(mixture, prompters[-1])
    plan, path = plan_packs(lengths, limits)
    found: dict[str, Any] = {
        **plan.statistics,
        **limits.model_dump(),
        "left_out": lengths.left_out,
        "bad": lengths.bad,
        "over_long": len(lengths.over_long(limits)),
        "named": _named(mixture, lengths, limits),
        "plan": str(path),
        "stages": [],
    }
    for index, (stage, prompter) in enumerate(zip(recipe.stages, prompters, strict=True)):
        own = measure(mixture, prompter)  # a stage may see images at another resolution
        draws = pack_draws(mixture, own, limits, stage, seed=recipe.seed, index=index)
        found["stages"].append(
            {
                "stage": stage.name,
                "batch_size": stage.batch_size,
                "packs": draws.packs,
                "samples": draws.per_update,
                "tokens": draws.packs * draws.order.tokens_per_pack,
            }
        )
    return found


def _named(mixture: Mixture, lengths: Lengths, limits: PackingConfig) -> list[str]:
    """The first samples of each kind that no pack holds: where they are, and why."""
    found: dict[str, list[str]] = {"over long": [], "left out": [], "bad": []}
    for row in lengths.over_long(limits)[:_SHOWN]:
        source, index = mixture.locate(int(row))
        size = f"{lengths.tokens[row]:,} tokens, {lengths.images[row]:,} image(s)"
        found["over long"].append(f"{source.rows.where(index)}: {size}")
    for row, reason in zip(lengths.faults, lengths.reasons, strict=True):
        found["left out" if lengths.tokens[row] == LEFT_OUT else "bad"].append(reason)
    return [f"{kind}: {why}" for kind, all_of_it in found.items() for why in all_of_it[:_SHOWN]]
