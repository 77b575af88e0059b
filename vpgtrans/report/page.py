"""The page of one run: what moved where, what it cost, how it went, and what it says about held-out images."""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from vpgtrans.evaluation.metrics import token_f1
from vpgtrans.report import format as fmt
from vpgtrans.report.course import course_notes, kind_notes, pace, stage_remarks
from vpgtrans.report.curves import RunCurves, run_curves
from vpgtrans.report.html import Cell, Head, Table, keep_whole, sentence, write_page
from vpgtrans.report.plots import run_chart
from vpgtrans.report.read import RunFiles, image_uri, read_run
from vpgtrans.report.starts import start_values

_LONGEST_CAPTION = 160
"""Characters shown of one caption; an untrained model can babble for pages."""


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the files in `run` and return its path.

    Only summary.json must be there; a section whose file is missing says so.

    Raises:
        DataError: no run, no summary.json, or a malformed file.
        OutputError: the page can't be written.
    """
    files = read_run(run)
    curves = run_curves(files.metrics or [])
    samples = [_sample(files, sample) for sample in files.samples or []]
    return write_page(
        run / "report.html",
        "report.html.jinja",
        kind="A run of vpgtrans",
        title=f"{_moved(files)} · vpgtrans",
        headline=keep_whole(headline(files, curves), _names(files)),
        lead=best_notes(files.summary, curves),
        measured=_measured(files),
        key_figures=_key_figures(files.summary),
        version=(files.environment or {}).get("versions", {}).get("vpgtrans", ""),
        bill=_bill(files),
        bill_notes=course_notes(files),
        skipped=[(str(row.get("id", "?")), fmt.plain(row.get("reason") or row.get("error"))) for row in files.skipped]
        if files.skipped
        else [],
        skipped_line=f"Unreadable samples, skipped and counted in no figure: {fmt.count(len(files.skipped or []))}.",
        **_curve_values(files, curves),
        **start_values(files),
        samples=samples,
        samples_notes=_samples_notes(files, samples),
        trainable=_trainable(files.trainable or []),
        recipe=files.recipe,
        environment=[(key, fmt.plain(value)) for key, value in fmt.flatten(files.environment or {})],
        lineage=[(key.replace("_", " "), fmt.plain(value)) for key, value in fmt.flatten(files.lineage or {})],
    )


# --- the head -----------------------------------------------------------------------------------


def _names(files: RunFiles) -> tuple[str, str, str]:
    """Of the VPG, the LLM it was trained with, and the target; empty where the lineage doesn't say."""
    lineage = files.lineage or {}
    return fmt.name(lineage.get("source_vpg")), fmt.name(lineage.get("source_llm")), fmt.name(lineage.get("target_llm"))


def _moved(files: RunFiles) -> str:
    vpg, source, target = _names(files)
    if not target:
        return "This run"
    if not (vpg or source):
        return f"A new VPG, trained with {target}"
    return f"Moved {vpg or 'the VPG'}{f' from {source}' if source else ''} to {target}"


def headline(files: RunFiles, curves: RunCurves) -> str:
    """One sentence: what moved where, and what came out."""
    summary = files.summary
    first = curves.validation[0] if curves.validation and curves.validation[0][0] == 0 else None
    outcome = f"validation loss {fmt.decimal(summary.get('val_loss'))}"
    if first:
        outcome += f", down from {fmt.decimal(first[1])}" if _below(summary.get("val_loss"), first[1]) else ""
    bill = []
    samples = _samples_seen(summary)
    if samples is not None:
        bill.append(f"{fmt.count(samples)} samples")
    if fmt.is_number(summary.get("seconds")):
        bill.append(fmt.duration(summary["seconds"]))
    return f"{_moved(files)}: {outcome}" + (f", after {sentence(bill)}." if bill else ".")


def _below(value: Any, other: float) -> bool:
    return fmt.is_number(value) and value < other


def _stages(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage for stage in summary.get("stages") or [] if isinstance(stage, dict)]


def _samples_seen(summary: dict[str, Any]) -> int | None:
    samples = [stage["samples"] for stage in _stages(summary) if fmt.is_number(stage.get("samples"))]
    return sum(samples) if samples else None


def _key_figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("validation loss, nats a token", fmt.decimal(summary.get("val_loss"))),
        ("samples seen", fmt.count(_samples_seen(summary))),
        ("time in all", fmt.duration(summary.get("seconds"))),
        ("peak memory", fmt.size(summary.get("peak_memory_bytes"))),
    ]
    metrics = dict(summary.get("metrics") or {})
    intervals = metrics.pop("intervals", None) or {}
    for key, value in fmt.flatten(metrics):
        if isinstance(value, bool | str) or value is None or key.rpartition(".")[2] == "val_loss":
            continue
        shown = " ".join([fmt.metric(key, value), fmt.interval(key, intervals.get(key))]).strip()
        rows.append((fmt.metric_name(key), shown))
    return [row for row in rows if row[1] != fmt.NOTHING]


def _measured(files: RunFiles) -> str:
    """On which data the key figures were measured."""
    sets = (files.settings.get("data") or {}).get("validation") or []
    named = [f"{fmt.name(part['dataset'])}, split {part.get('split')}" for part in sets if part.get("dataset")]
    if not named:
        return ""
    most = (files.settings.get("trainer") or {}).get("validate_samples")
    limit = f", the loss on at most {fmt.count(most)} of them" if fmt.is_number(most) else ""
    return f"Loss and captions are measured on held-out images: {sentence(named)}{limit}."


def best_notes(summary: dict[str, Any], curves: RunCurves) -> list[str]:
    """Sentences that say when training on made things worse, and which checkpoint the result is."""
    best = curves.best
    if best is None:
        return []
    last = curves.validation[-1]
    if last[1] <= best[1]:
        return []
    if best[0] == 0:
        text = f"Training made the validation loss worse: it was best, {fmt.decimal(best[1])}, before the first update"
    else:
        text = f"Validation loss was best, {fmt.decimal(best[1])}, at {fmt.count(best[0])} samples"
    text += f"; training on to {fmt.count(last[0])} samples raised it to {fmt.decimal(last[1])}."
    final = summary.get("val_loss")
    if fmt.is_number(final):
        kept = abs(final - best[1]) <= 1e-3 * abs(best[1])
        text += " The result is that best checkpoint." if kept else f" The result's own is {fmt.decimal(final)}."
    return [text]


# --- the bill -----------------------------------------------------------------------------------


def _bill(files: RunFiles) -> Table:
    summary = files.summary
    table = Table(
        "Samples, time and memory by stage",
        [
            Head("Stage", numeric=False),
            Head("Updates"),
            Head("Samples", "by stage"),
            Head("Time"),
            Head("Pace", "updates alone"),
            Head("Peak memory"),
            Head("Validation loss", "its best, nats a token"),
        ],
        total=True,
        cards=True,
    )
    paid = 0.0
    converter = summary.get("converter")
    if isinstance(converter, dict):
        shared, starts = converter.get("shared_tokens"), len(files.initialisers or [])
        notes = [f"{fmt.count(shared)} shared tokens"] if shared is not None else []
        notes += [f"with the scoring of {fmt.count(starts)} starts"] if starts > 1 else []
        table.add(
            Cell("word converter" if shared is not None else "first projector", below=", ".join(notes)),
            fmt.NOTHING,
            "0",
            fmt.duration(converter.get("seconds")),
            fmt.NOTHING,
            fmt.size(_memory(converter)),
            fmt.NOTHING,
        )
        paid += converter["seconds"] if fmt.is_number(converter.get("seconds")) else 0.0
    several = len(_stages(summary)) > 1
    for stage in _stages(summary):
        best = stage.get("best_samples")  # counted over all stages, unlike `samples`
        table.add(
            Cell(str(stage.get("name", "?")), below=stage_remarks(stage)),
            fmt.count(stage.get("updates")),
            fmt.count(stage.get("samples")),
            fmt.duration(stage.get("seconds")),
            pace(stage),
            fmt.size(_memory(stage)),
            Cell(
                fmt.decimal(stage.get("val_loss")),
                below=f"at {fmt.count(best)} samples{' in all' if several else ''}" if best is not None else "",
            ),
        )
        paid += stage["seconds"] if fmt.is_number(stage.get("seconds")) else 0.0
    total = summary.get("seconds")
    if fmt.is_number(total) and total - paid >= 0.05:
        table.add(
            Cell("everything else", below="loading the models, captions before and after, evaluation"),
            fmt.NOTHING,
            fmt.NOTHING,
            fmt.duration(total - paid),
            fmt.NOTHING,
            fmt.NOTHING,
            fmt.NOTHING,
        )
    updates = [stage["updates"] for stage in _stages(summary) if fmt.is_number(stage.get("updates"))]
    table.add(
        "in all",
        fmt.count(sum(updates) if updates else None),
        fmt.count(_samples_seen(summary)),
        fmt.duration(total),
        fmt.NOTHING,
        fmt.size(summary.get("peak_memory_bytes")),
        fmt.decimal(summary.get("val_loss")),
    )
    if all(stage.get("samples_per_second") is None for stage in _stages(summary)):
        table.drop_empty_columns()
    return table


def _memory(row: dict[str, Any]) -> Any:
    return row.get("peak_memory_bytes", row.get("memory_bytes"))


# --- sections -----------------------------------------------------------------------------------


def _curve_values(files: RunFiles, curves: RunCurves) -> dict[str, Any]:
    validations = Table(
        "Validation loss by samples seen, over all stages",
        [Head("Samples", numeric=False), Head("Stage", numeric=False), Head("Validation loss")],
    )
    best = curves.best
    for point, stage in zip(curves.validation, curves.validated_in, strict=True):
        validations.add(
            fmt.count(point[0]),
            stage,
            Cell(fmt.decimal(point[1]), mark="best" if point == best else ""),
            emphasised=point == best,
        )
    values: dict[str, Any] = {"chart": None, "chart_absent": "", "curve_notes": [], "validations": validations}
    if not (curves.train or curves.validation):
        values["chart_absent"] = (
            "No curves: the run directory holds no metrics.jsonl."
            if files.metrics is None
            else "No curves: metrics.jsonl holds no loss."
        )
        return values
    notes = best_notes(files.summary, curves)
    if best and not notes:
        notes = [f"Validation loss was best at the end: {fmt.decimal(best[1])} at {fmt.count(best[0])} samples."]
    stages = [f"{name} from {fmt.count(start)} to {fmt.count(stop)}" for name, start, stop in curves.stages]
    description = f"Loss against samples seen; stages: {sentence(stages)}. {' '.join(notes)}"
    if curves.train:
        description += (
            f" Training loss went from {fmt.decimal(curves.train[0][1])} to {fmt.decimal(curves.train[-1][1])}."
        )
    values["chart"] = run_chart(
        curves, prefix="run", title="Training and validation loss, and learning rate", description=description
    )
    led = best_notes(files.summary, curves)
    values["curve_notes"] = [*(note for note in notes if note not in led), *kind_notes(files)]
    return values


def _trainable(rows: list[dict[str, Any]]) -> list[Table]:
    """One table a stage: part, mode, parameters, how many of them train, learning rate."""
    tables = []
    for stage in dict.fromkeys(str(row.get("stage", "")) for row in rows):
        parts = [row for row in rows if str(row.get("stage", "")) == stage]
        trained, present = (
            sum(row[key] for row in parts if fmt.is_number(row.get(key))) for key in ("trained", "parameters")
        )
        table = Table(
            f"{stage}: {fmt.count(trained)} of {fmt.count(present)} parameters trained",
            [
                Head("Part", numeric=False),
                Head("Mode", "learning rate", numeric=False),
                Head("Parameters"),
                Head("Of them train"),
            ],
        )
        for row in parts:
            mode = str(row.get("mode", ""))
            rate = fmt.learning_rate(row["lr"]) if mode != "frozen" and row.get("lr") is not None else ""
            figures = (fmt.count(row.get(key)) for key in ("parameters", "trained"))
            table.add(str(row.get("part", "")), Cell(mode, below=rate), *figures)
        tables.append(table)
    return tables


# --- held-out images ----------------------------------------------------------------------------


_BEFORE, _AFTER = "Before training", "After training"


@dataclass(frozen=True)
class Caption:
    """One caption on a card, beside its reference."""

    label: str
    text: str
    right: bool
    share: float
    """Token F1, the best over references."""

    @property
    def verdict(self) -> str:
        if self.right:
            return "✓ right"
        return f"{max(1, min(99, round(100 * self.share)))} % words right" if self.share else "✗ no word right"

    @property
    def grade(self) -> str:
        """Its CSS class."""
        return "right" if self.right else "partly" if self.share else ""


def same_words(caption: Any, reference: str) -> bool:
    """True where both hold the same words in the same order, case and punctuation aside."""
    words = re.findall(r"\w+", str(caption or "").casefold())
    return bool(words) and words == re.findall(r"\w+", reference.casefold())


def _sample(files: RunFiles, sample: dict[str, Any]) -> dict[str, Any]:
    given = sample.get("reference")
    references = [str(text) for text in given] if isinstance(given, list) else [str(given or "")]
    captions = []
    for key, label in (("before", _BEFORE), ("after", _AFTER)):
        if sample.get(key) is None:
            continue
        caption = str(sample[key])
        right = any(same_words(caption, reference) for reference in references)
        share = 1.0 if right else token_f1([caption], [references])[0] if references else 0.0
        captions.append(Caption(label, _shorten(caption), right, share))
    return {
        "id": str(sample.get("id", "")),
        "image": image_uri(files.path, sample.get("image")),
        "reference": " / ".join(references),
        "captions": captions,
    }


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    if not text:
        return "(nothing)"
    over = len(text) - _LONGEST_CAPTION
    return text if over <= 0 else f"{text[:_LONGEST_CAPTION]}… (and {fmt.count(over)} characters more)"


def _samples_notes(files: RunFiles, samples: list[dict[str, Any]]) -> list[str]:
    """What the cards show, and how many of their captions are right."""
    exact, words = [], []
    for label in (_BEFORE, _AFTER):
        captions = [caption for sample in samples for caption in sample["captions"] if caption.label == label]
        if captions:
            exact.append(f"{sum(caption.right for caption in captions) or 'none'} of {len(captions)} {label.lower()}")
            mean = fmean(caption.share for caption in captions)
            words.append(f"{fmt.percent(mean)} {label.lower()}")
    if not exact:
        return []
    notes = [
        f"Of the images shown here, described exactly right: {sentence(exact)}; words right: {sentence(words)}. "
        "Exactly right means the reference's words in its order, case and punctuation aside; words right is the token "
        "F1: words that both have, over the mean length of both.",
        "Before training means with the first projector as it was made, untrained.",
    ]
    template = (files.settings.get("prompt") or {}).get("template")
    if isinstance(template, str) and (words_only := " ".join(template.replace("<image>", " ").split())):
        shown = " ".join(template.replace("<image>", " ⟨image⟩ ").split())
        notes[1] += (
            f" The LLM goes on from the prompt “{shown}”; while the images say nothing to it yet, it may "
            f"repeat “{words_only.split()[-1]}” or talk at random."
        )
    return notes
