"""What the page says of the course of training: pace, skipped updates, early ends, picked rates, kinds of images."""

from typing import Any

from vpgtrans.report import format as fmt
from vpgtrans.report.html import Cell, sentence
from vpgtrans.report.read import RunFiles


def pace(stage: dict[str, Any]) -> Cell:
    """Samples and tokens a second, and how much of the processor that is, where it is known."""
    if not fmt.is_number(stage.get("samples_per_second")):
        return Cell(fmt.NOTHING)
    below = []
    if fmt.is_number(stage.get("tokens_per_second")):
        below.append(f"{fmt.count(round(stage['tokens_per_second']))} tokens/s")
    if fmt.is_number(stage.get("mfu")):
        below.append(f"MFU {fmt.percent(stage['mfu'])}")
    return Cell(f"{stage['samples_per_second']:.3g} samples/s", below=", ".join(below))


def stage_remarks(stage: dict[str, Any]) -> str:
    """What stands below a stage's name."""
    test, skipped = stage.get("range_test"), stage.get("skipped")
    remarks = ["ended early"] if stage.get("stopped_early") else []
    remarks += [f"learning rate {fmt.learning_rate(test['rate'])} picked by a range test"] if test else []
    remarks += [f"{fmt.count(skipped)} update{'s' if skipped > 1 else ''} skipped"] if skipped else []
    return ", ".join(remarks)


def course_notes(files: RunFiles) -> list[str]:
    """Sentences below the bill: what a range test cost, which updates were skipped and why."""
    notes = []
    for stage in files.summary.get("stages") or []:
        if test := stage.get("range_test"):
            cost = f"{fmt.count(test['samples'])} samples besides those of the stage, {fmt.duration(test['seconds'])}"
            notes.append(
                f"The learning rate of {stage.get('name')}, {fmt.learning_rate(test['rate'])}, was picked by a range "
                f"test: {cost} of its time; what they taught was forgotten."
            )
        if stage.get("stopped_early"):
            rule = _stage_settings(files, stage.get("name")).get("early_stopping") or {}
            after = f" after {rule['patience']} validations without an improvement" if "patience" in rule else ""
            notes.append(f"{stage.get('name')} ended before its budget was spent{after}.")
    skipped = [line for line in files.metrics or [] if isinstance(line.get("skipped"), str)]
    for line in skipped[:5]:
        names = [str(name) for name in line.get("ids") or []]
        shown = sentence(names[:4] + ([f"{len(names) - 4} more"] if len(names) > 4 else []))
        place = f"{line.get('stage')}, update {fmt.count(line.get('update'))}"
        notes.append(f"Skipped: {place}: {line['skipped']}" + (f"; its samples: {shown}." if shown else "."))
    if len(skipped) > 5:
        notes.append(f"{fmt.count(len(skipped) - 5)} more skipped updates stand in metrics.jsonl.")
    return notes


def kind_notes(files: RunFiles) -> list[str]:
    """What losses of a chart can't be compared by, and how samples were laid out."""
    notes = []
    settings = files.settings
    stages = [stage for stage in settings.get("stages") or [] if isinstance(stage, dict)]
    kinds = {str(stage.get("name")): _resolution(stage, settings) for stage in stages}
    if len(set(kinds.values())) > 1:
        seen = sentence([f"{name} with {kind}" for name, kind in kinds.items()])
        notes.append(
            f"Stages see images differently: {seen}. A jump of the curves between them is another task, not a loss of "
            "what was learnt."
        )
    packing = (settings.get("data") or {}).get("packing")
    if isinstance(packing, dict) and fmt.is_number(packing.get("max_tokens")):
        notes.append(f"Samples shared rows of at most {fmt.count(packing['max_tokens'])} tokens (packing).")
    return notes


def _resolution(stage: dict[str, Any], settings: dict[str, Any]) -> str:
    """In words, as far as the recipe says it."""
    general = settings.get("resolution") or {}
    tokens, size = (stage.get(key) or general.get(key) for key in ("visual_tokens", "image_size"))
    said = [f"{fmt.count(tokens)} visual tokens"] if tokens else []
    said += [f"{fmt.count(size)} pixels a side"] if size else []
    return " and ".join(said) or "the VPG's own resolution"


def _stage_settings(files: RunFiles, name: Any) -> dict[str, Any]:
    stages = files.settings.get("stages") or []
    return next((stage for stage in stages if isinstance(stage, dict) and stage.get("name") == name), {})
