"""The page's section on the first projector: every start that was scored, and the one taken."""

import re
from typing import Any

from vpgtrans.report import format as fmt
from vpgtrans.report.html import Cell, Head, Table
from vpgtrans.report.read import RunFiles

_LEAST_MEMORY = 8 << 20
"""Bytes below which a difference of peaks says nothing: later starts work in the memory that earlier ones left."""

_PROBE_HEADS = [
    Head("Start", numeric=False),
    Head("Shared tokens", "pairs, coverage"),
    Head("Direction match", "centred cosine"),
    Head("Words found again", "recall@1"),
    Head("Length against words", "norm ratio"),
    Head("Words still readable", "copy gap recovered"),
    Head("Caption loss, untrained", "step-0 loss"),
    Head("What the image adds", "image gap, interval"),
    Head("Prompt length", "prompt-norm ratio"),
    Head("Cost", "time, memory"),
]

_COLUMN_NOTES = [
    ("Shared tokens", "tokens that both LLMs have byte for byte, and the share of the target's vocabulary they cover."),
    ("Direction match", "how well converted words point at the target's own, means removed; 1 is perfect."),
    ("Words found again", "share of held-out words whose nearest neighbour after conversion is the right one."),
    ("Length against words", "length of converted words over that of the target's words; 1 is right."),
    (
        "Words still readable",
        "the target LLM copies text from converted words: 100 %: as well as from its own; 0 %: as from their mean.",
    ),
    ("Caption loss, untrained", "loss on held-out captions before any training, nats a token; lower is better."),
    (
        "What the image adds",
        "that loss with shuffled images minus the loss with the right ones; where the interval holds zero, "
        "the images carry no usable signal yet.",
    ),
    ("Prompt length", "length of visual prompts over that of the target's words."),
    ("Cost", "time, and memory beyond what was in use; none is shown where that is too little to measure."),
]

_START_TERMS = [
    ("caption-fit", "a correction of the start it is made over, fitted on captions by regression, without training."),
    (
        "cca",
        "a linear map from the source LLM's word embeddings to the target's, fitted on shared tokens by canonical "
        "correlation analysis; with α = 1 it is least squares, with α = 0 converted words spread like the target's.",
    ),
    ("ridge", "a linear map between the word embeddings of both LLMs, fitted on shared tokens by least squares."),
    ("procrustes", "a rotation and one scale between the word embeddings of both LLMs, fitted on shared tokens."),
    ("omp", "each word as a sum of few shared ones, the same sum taken in the target, distilled into a linear map."),
    ("sgd", "the word converter trained by gradient descent on the cosine, as published."),
    ("RMS-matched", "scaled so that converted words are as long, on average, as the target's."),
    ("inherit", "a new random projector; the trained VPG is kept."),
    ("keep", "the source's projector as it is: both LLMs share one embedding table."),
    ("random", "a new projector of random numbers."),
]
"""What the parts of a start's name mean."""


def start_values(files: RunFiles) -> dict[str, Any]:
    """For the template."""
    rows = files.initialisers or []
    chosen = next((row for row in rows if row.get("chosen")), None)
    taken = files.summary.get("initialiser")
    name = chosen.get("name") if chosen else taken.get("kind") if isinstance(taken, dict) else taken
    notes = []
    if name:
        reason = str(chosen.get("note") or "").rstrip(".") if chosen else ""
        if not reason and len(rows) == 1:
            reason = "The recipe names this start, so no other was scored"
        notes.append(f"Taken: {name}." + (f" {reason[0].upper()}{reason[1:]}." if reason else ""))
    low, high = (chosen.get(f"image_gap_{end}") if chosen else None for end in ("low", "high"))
    if fmt.is_number(low) and fmt.is_number(high) and low <= 0 <= high:
        notes.append("Its image gap can't be told from zero: before training, no usable signal, so warm-up was needed.")
    names = " ".join(str(row.get("name", "")) for row in rows) or str(name or "")
    terms = [(term, text) for term, text in _START_TERMS if re.search(rf"(?<!\w){term}(?!\w)", names)]
    table = None
    if rows:
        caption = "Every start scored without training" if len(rows) > 1 else "The first projector, before training"
        table = Table(caption, _PROBE_HEADS, cards=True, dense=True)
        for row in rows:
            _add_probe_row(table, row, several=len(rows) > 1)
        table.drop_empty_columns()
    shown = {head.text for head in table.heads} if table else set()
    return {
        "initialisers": table,
        "initialiser_notes": notes,
        "start_terms": terms,
        "column_notes": [(head, text) for head, text in _COLUMN_NOTES if head in shown],
    }


def _add_probe_row(table: Table, row: dict[str, Any], *, several: bool) -> None:
    chosen = bool(row.get("chosen")) and several
    low, high = row.get("image_gap_low"), row.get("image_gap_high")
    coverage = row.get("coverage")
    memory = row.get("memory_bytes")
    table.add(
        Cell(
            str(row.get("name", "?")),
            below=str(row.get("note") or "") if several and not chosen else "",
            mark="chosen" if chosen else "",
        ),
        Cell(fmt.count(row.get("pairs")), below=fmt.percent(coverage) if coverage is not None else ""),
        fmt.decimal(row.get("centred_cosine")),
        fmt.percent(row.get("recall_at_1")),
        fmt.decimal(row.get("norm_ratio"), 2),
        fmt.percent(row.get("copy_gap_recovered")),
        fmt.decimal(row.get("step0_loss")),
        Cell(
            fmt.decimal(row.get("image_gap")),
            below=f"[{fmt.decimal(low)}, {fmt.decimal(high)}]" if fmt.is_number(low) and fmt.is_number(high) else "",
        ),
        fmt.decimal(row.get("prompt_norm_ratio"), 2),
        Cell(
            fmt.duration(row.get("seconds")),
            below=fmt.size(memory) if fmt.is_number(memory) and memory >= _LEAST_MEMORY else "",
        ),
        emphasised=chosen,
    )
