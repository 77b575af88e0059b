"""A first recipe: what was asked for, the method's usual values, and a word on each, for its owner to go on from."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vpgtrans import recipe_file
from vpgtrans.recipe import Recipe, parse_recipe
from vpgtrans.recipe_schema import MODELINE
from vpgtrans.training.config import NORMAL_RATE, WARMUP_FACTOR

Tune = Literal["frozen", "lora", "qlora", "full"]
TUNES: tuple[Tune, ...] = ("frozen", "lora", "qlora", "full")
"""What the fine-tune does with the LLM."""

_LONGEST_WARMUP = 0.1
"""Of the samples, at most this share warms the projector up: the published transfers spent a tenth on it."""
_BATCH = 64


@dataclass(frozen=True)
class Draft:
    """What a recipe is to say."""

    name: str
    source: str
    target: str
    train: Sequence[Mapping[str, Any]]
    """Data sources, as a recipe has them."""
    validation: Sequence[Mapping[str, Any]]
    samples: int = 100_000
    """Seen in all, the warm-up's among them."""
    tune: Tune = "lora"
    pack: int | None = None
    """Tokens of a packed row; None: padded rows."""

    @property
    def warmup(self) -> int:
        """Samples of the warm-up: whole batches, one at least."""
        return max(1, int(self.samples * _LONGEST_WARMUP) // _BATCH) * _BATCH

    @property
    def finetune(self) -> int:
        """Samples of the fine-tune."""
        return max(_BATCH, self.samples - self.warmup)


def name_from(file: Path) -> str:
    """A run's name after its recipe's file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "recipe"


def draft_text(draft: Draft, file: Path, *, schema: bool) -> str:
    """The recipe as YAML, with comments.

    Args:
        file: where it will lie, for the commands in its head. schema: name the schema beside it.
    """
    place = _comment(shlex.quote(str(file)))
    commands = [
        (f"vpgtrans validate {place}", "keys, values, references and widths; no weights"),
        (f"vpgtrans data stats {place} --show 3", "the data as the target LLM sees it"),
        (f"vpgtrans probe {place}", "score every way to start, without training"),
        (f"vpgtrans transfer {place}", "the main job"),
    ]
    width = max(len(command) for command, _ in commands)
    lines = [
        MODELINE.rstrip() if schema else None,
        f"# {_comment(draft.source)} -> {_comment(draft.target)}",
        *(f"#   {command:<{width}}   {what}".rstrip() for command, what in commands),
        "# Any key can be changed for one run:  stages.finetune.lr=5e-5  seed=1",
        f"name: {_scalar(draft.name)}",
        "",
        "# A VLM whose eyes are taken: BLIP-2 or LLaVA-1.5 layout, a run, a VLM directory, registry:NAME",
        f"source: {{vpg: {_scalar(draft.source)}}}",
        "# The LLM that gets them: any causal LLM of transformers, or a .gguf file",
        "target:",
        f"  llm: {_scalar(draft.target)}",
        "  quantise: nf4   # QLoRA: the blocks' weights in 4 bits" if draft.tune == "qlora" else None,
        "",
        "# Scores every way to a first projector and takes the best; converter, inherit, … name one",
        "initialiser: auto",
        "",
        "data:",
        *_sources("train", draft.train),
        *_sources("validation", draft.validation),
        "  # Samples share rows of so many tokens: no padding" if draft.pack else None,
        f"  packing: {{max_tokens: {draft.pack}}}" if draft.pack else None,
        "",
        "stages:",
        "  # The projector alone, at a rate that would ruin anything else",
        "  - name: warmup",
        "    trainable: {projector: full}",
        f"    lr: {_number(NORMAL_RATE * WARMUP_FACTOR)}",
        f"    batch_size: {_BATCH}",
        None
        if draft.pack
        else "    # micro_batch_size: 8      # where a batch does not fit at once; it changes nothing else",
        f"    budget: {{samples: {draft.warmup}}}",
        "  # Then more of it, at a normal rate; the best validation counts, not the last",
        "  - name: finetune",
        f"    trainable: {{{_trainable(draft.tune)}}}",
        f"    lr: {_number(NORMAL_RATE)}",
        "    lora: {rank: 16, alpha: 32}" if draft.tune in ("lora", "qlora") else None,
        f"    batch_size: {_BATCH}",
        None if draft.pack else "    # micro_batch_size: 8",
        f"    budget: {{samples: {draft.finetune}}}",
        "    # early_stopping: {patience: 3}   # transferred models are often best early",
        "",
        "trainer:",
        "  validate_samples: 1000",
        "  # gradient_checkpointing: true    # less memory, more time",
        "seed: 0",
    ]
    return "\n".join(line for line in lines if line is not None) + "\n"


def checked(text: str, file: Path) -> Recipe:
    """The recipe that a text is.

    Raises:
        RecipeError: a value can't stand there.
    """
    return parse_recipe(recipe_file.parser(typ="safe").load(text), name=str(file))


def _trainable(tune: Tune) -> str:
    llm = {"frozen": "", "lora": ", llm: lora", "qlora": ", llm: lora", "full": ", llm: full"}[tune]
    return f"connector: full, projector: full{llm}"


def _sources(role: str, sources: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"  {role}:",
        *(f"    - {{{', '.join(f'{k}: {_scalar(v)}' for k, v in each.items())}}}" for each in sources),
    ]


def _scalar(value: Any) -> str:
    """A value as YAML in a flow mapping; text is quoted unless it is plainly text."""
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z./][\w./@-]*(:[\w./@-]+)*", value, re.ASCII) and value.lower() not in _WORDS:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in quoted)


_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", ".nan", ".inf"}
"""What some reader of YAML takes for something else than text."""


def _number(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _comment(text: str) -> str:
    """In one line, without what no YAML file holds."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
