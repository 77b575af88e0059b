"""`data stats`: what a recipe's data holds, as the recipe's target sees it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpgtrans.data import stats
from vpgtrans.data.mixture import Mixture, open_mixture
from vpgtrans.data.stats import SourceStats
from vpgtrans.errors import OutputError
from vpgtrans.llm import max_tokens_of, open_config, open_tokenizer
from vpgtrans.progress import bar
from vpgtrans.prompts import Prompter
from vpgtrans.recipe import Recipe
from vpgtrans.report import write_data_report
from vpgtrans.runs.parts import outline_of, prompt_of

SAMPLES = 1000
"""Rows of a source that are measured unless asked for more."""
PICTURED = 24
"""Samples on the page."""


def data_stats(
    recipe: Recipe, *, samples: int | None = SAMPLES, show: int = 0, html: Path | None = None
) -> dict[str, Any]:
    """Rows, tokens, images, resolutions and padding of a recipe's data; no model is loaded.

    Args:
        samples: rows of each source that are measured; None: all.
        show: how many training samples come along as the LLM sees them. html: a page to write.

    Raises:
        ReferenceError_, DataError, RecipeError: the target's tokenizer, the source or the data don't open.
        OutputError: the page can't be written.
    """
    if html is not None and not html.parent.is_dir():
        raise OutputError(f"{html}: there is no directory {html.parent}")
    train, validation = open_mixture(recipe.data.train), open_mixture(recipe.data.validation)
    prompters = open_prompters(recipe)
    prompter = prompters[-1]
    measured = _measure(train, prompter, samples, seed=recipe.seed, title="train")
    held_out = _measure(validation, prompter, samples, seed=recipe.seed, title="validation")
    found: dict[str, Any] = {
        "recipe": recipe.name,
        "llm": recipe.target.llm,
        "visual_tokens": prompter.visual_tokens,
        "max_tokens": prompter.max_tokens,
        "prompt": prompter.config.model_dump(mode="json"),
        "samples": samples,
        "train": stats.summary(measured),
        "validation": stats.summary(held_out),
        "padding": _padding(recipe, train, prompters, samples),
    }
    if html is not None:
        pictured = stats.show(measured, prompter, max(show, PICTURED), seed=recipe.seed)
        write_data_report(html, found, pictured)
    found["shown"] = [shown.to_json() for shown in stats.show(measured, prompter, show, seed=recipe.seed)]
    return found


def open_prompter(recipe: Recipe) -> Prompter:
    """What the last stage of a recipe makes token ids with; neither the LLM nor an encoder is loaded."""
    return open_prompters(recipe)[-1]


def open_prompters(recipe: Recipe) -> list[Prompter]:
    """As `open_prompter`, of every stage: they may see images differently."""
    outline = outline_of(recipe)
    trust = recipe.target.trust_remote_code
    tokenizer = open_tokenizer(recipe.target.llm, trust_remote_code=trust)
    limit = max_tokens_of(open_config(recipe.target.llm, trust_remote_code=trust))
    prompt = prompt_of(recipe, outline.prompt)
    prompters: list[Prompter] = []
    for stage in recipe.stages:
        outline.vpg.set_resolution(recipe.resolution_of(stage))
        tokens, layouts = outline.vpg.tokens, outline.vpg.layouts
        prompters.append(Prompter(tokenizer, prompt, visual_tokens=tokens, layouts=layouts, limit=limit))
    return prompters


def _measure(mixture: Mixture, prompter: Prompter, samples: int | None, *, seed: int, title: str) -> list[SourceStats]:
    rows = [stats.choose(source, samples, seed=seed) for source in mixture.sources]
    with bar() as progress:
        task = progress.add_task(title, total=sum(map(len, rows)), note="")
        return [
            stats.measure(source, some, prompter, share=float(share), each=lambda: progress.advance(task))
            for source, some, share in zip(mixture.sources, rows, mixture.shares, strict=True)
        ]


def _padding(
    recipe: Recipe, train: Mixture, prompters: Sequence[Prompter], samples: int | None
) -> list[dict[str, Any]]:
    """Of every stage, on the first samples that it draws."""
    rows: list[dict[str, Any]] = []
    first = 0
    known: list[stats.DrawnLengths] = []
    for stage, prompter in zip(recipe.stages, prompters, strict=True):
        if not known or recipe.resolution_of(stage) != recipe.resolution_of(recipe.stages[len(rows) - 1]):
            known.append(stats.DrawnLengths(train, prompter, seed=recipe.seed))
        lengths_of = known[-1]
        budget = stage.budget.samples or len(train)  # one in tokens ends about where nobody knows beforehand
        lengths = lengths_of(first, first + min(budget, samples or len(train)))
        size = stage.micro_batch_size or stage.batch_size
        rows.append(
            {
                "stage": stage.name,
                "at_once": size,
                "samples": len(lengths),
                "as_drawn": stats.padding(lengths, size),
                "if_sorted": stats.padding(np.sort(lengths), size),
            }
        )
        first += budget
    return rows
