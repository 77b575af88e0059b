"""`vpgtrans data pack`: which samples of a recipe's training data would share a row."""

import hashlib
import json
import logging
from typing import Any

import numpy as np

from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.packing import PackPlan, PlanKey, pack
from vpgtrans.errors import DataError, Dropped
from vpgtrans.llm import tokenizer_sha256
from vpgtrans.progress import track
from vpgtrans.prompts import Prompter
from vpgtrans.recipe import Recipe
from vpgtrans.references import cache_dir
from vpgtrans.runs.data import open_prompter

_LOGGER = logging.getLogger(__name__)


def data_pack(
    recipe: Recipe, *, max_tokens: int, max_images: int | None = None, max_samples: int | None = None
) -> dict[str, Any]:
    """Plan packs of all training samples, each once; the plan is kept in the cache, for as long as nothing changes.

    Returns:
        fill, packs, samples, tokens, tokens_per_pack, images_per_pack, samples_per_pack; dropped: samples in no pack,
        and of them over_long (they alone pass a limit), left_out (by a rule of the data) and bad; plan: the file.

    Raises:
        ReferenceError_, DataError, RecipeError: the tokenizer, the source or the data don't open, or nothing fits.
    """
    mixture, prompter = open_mixture(recipe.data.train), open_prompter(recipe)
    key = PlanKey(
        data=hashlib.sha256("\n".join(source.fingerprint for source in mixture.sources).encode()).hexdigest(),
        tokenizer=tokenizer_sha256(prompter.tokenizer),
        prompt=json.dumps([prompter.config.model_dump(mode="json"), prompter.max_tokens], sort_keys=True),
        visual_tokens=str(prompter.visual_tokens),
        max_tokens=max_tokens,
        max_images=max_images,
        max_samples=max_samples,
    )
    path = cache_dir() / "packs" / f"{key.digest[:32]}.safetensors"
    counts = path.with_suffix(".json")
    if path.is_file() and counts.is_file():
        _LOGGER.info("nothing changed since this was planned: %s", path)
        plan, found = PackPlan.load(path, key), json.loads(counts.read_text())
    else:
        lengths, images, found = _measure(mixture, prompter, max_tokens)
        plan = pack(lengths, images=images, max_tokens=max_tokens, max_images=max_images, max_samples=max_samples)
        path.parent.mkdir(parents=True, exist_ok=True)
        counts.write_text(json.dumps(found))
        plan.save(path, key)
    if not len(plan):
        raise DataError(f"no sample fits a pack of {max_tokens:,} tokens; the shortest has {found['shortest']:,}")
    statistics = plan.statistics
    over_long = int(statistics["dropped"]) - found["left_out"] - found["bad"]
    return statistics | {key: found[key] for key in ("left_out", "bad")} | {"over_long": over_long, "plan": str(path)}


def _measure(mixture: Mixture, prompter: Prompter, max_tokens: int) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Tokens and images of every sample; one that can't be read, or is left out, is too long for any pack."""
    lengths = np.full(len(mixture), max_tokens + 1, dtype=np.int64)
    images = np.zeros(len(mixture), dtype=np.int64)
    left_out = bad = 0
    for row in track(range(len(mixture)), "counting tokens"):
        try:
            encoded = prompter.encode(mixture.sample(row).text)
        except Dropped:
            left_out += 1
        except DataError as error:
            bad += 1
            _LOGGER.debug("skipped: %s", error)
        else:
            lengths[row], images[row] = len(encoded), encoded.images
    if bad:
        _LOGGER.warning("%d rows can't be read; `vpgtrans data stats` names some", bad)
    return lengths, images, {"left_out": left_out, "bad": bad, "shortest": int(lengths.min(initial=max_tokens + 1))}
