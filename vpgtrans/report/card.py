"""The model card: what a checkpoint is, where it comes from, what it cost and scores, how to use it and make it again.

Markdown that reads well on the hub and in a terminal: no HTML, pictures beside it. What a model said is shown as it
was said, and never becomes Markdown.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpgtrans.files import appearing
from vpgtrans.registry.entry import DataUse, Kind, Licence, Metric
from vpgtrans.report import format as fmt
from vpgtrans.report.curves import run_curves
from vpgtrans.report.front_matter import front_matter, hub_name
from vpgtrans.report.html import sentence
from vpgtrans.report.plots import run_png
from vpgtrans.report.read import RunFiles, image_bytes, read_mapping, read_run

CARD = "README.md"
PICTURES = "card"
"""The folder of its pictures."""
_EXAMPLES = 6
_LONGEST = 160
"""Characters shown of one caption."""
_MARKUP = re.compile(r"[\\`*_{}\[\]<>|~&$!@]|:(?=//)|(?<=www)\.|^[-+#=]")
"""What Markdown, as the hub and terminals show it, takes for more than text: at a line's beginning, or anywhere."""
_WHAT = {
    "vlm": "A vision-language model: a visual prompt generator (VPG), a projector",
    "vpg": "A visual prompt generator (VPG) with its projector",
    "projector": "A projector",
    "adapter": "A LoRA adapter",
}


@dataclass(frozen=True)
class Card:
    """A card and the pictures that it shows."""

    text: str
    pictures: dict[str, bytes]
    """Path beside the card -> the file."""

    def write(self, directory: Path) -> None:
        """Into a VLM directory, whose manifest lists no cards."""
        for path, content in self.pictures.items():
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes(content)
        with appearing(directory / CARD) as temporary:
            temporary.write_text(self.text, encoding="utf-8")


@dataclass(frozen=True)
class Publication:
    """What is known of a checkpoint once it is published."""

    name: str
    """ID@VERSION."""
    kind: Kind
    description: str
    licence: Licence
    data: tuple[DataUse, ...]
    metrics: tuple[Metric, ...]
    hub: str | None = None
    """ORG/REPO, where it goes to the hub."""
    base_model: str | None = None
    """ORG/REPO of the LLM on the hub, where its reference doesn't say it."""


def model_card(manifest: dict[str, Any], files: RunFiles | None = None, published: Publication | None = None) -> Card:
    """The card of a VLM directory, from its manifest, what the run left behind, and what its publisher said."""
    pictures: dict[str, bytes] = {}
    title = published.name.partition("@")[0] if published else str(manifest["lineage"].get("recipe") or "A VLM")
    sections = [f"# {title}", _what(manifest, published), _parts(manifest)]
    if forced := manifest["lineage"].get("forced"):
        lines = "\n".join(f"- {_plain(reason)}" for reason in forced)
        sections.append(f"## Checks that were set aside\n\nSomebody went on (`--force`) although:\n\n{lines}")
    if files is not None:
        sections += [_bill(files), _curves(files, pictures), _examples(files, pictures)]
    sections += [_scores(_metrics(manifest, files, published)), _use(manifest, published), _terms(manifest, published)]
    if files is not None:
        sections.append(_again(files))
    head = front_matter(manifest, title=title, published=published)
    return Card("\n\n".join([head, *(section for section in sections if section)]) + "\n", pictures)


def write_card(run: Path) -> Path:
    """Write the card of a finished run's VLM, vlm/README.md; returns its path. Raises DataError as `read_run`."""
    vlm = run / "vlm"
    model_card(read_mapping(vlm / "manifest.json"), read_run(run)).write(vlm)
    return vlm / CARD


# --- what it is -----------------------------------------------------------------------------------


def _what(manifest: dict[str, Any], published: Publication | None) -> str:
    kind = published.kind if published else "vlm"
    llm, lineage = manifest["llm"]["reference"], manifest["lineage"]
    joined = {"vlm": f" and `{llm}`", "vpg": f", trained with `{llm}`"}.get(kind, f" for `{llm}`")
    came = f", moved from {_plain(fmt.name(lineage['source_llm']))}" if lineage.get("source_llm") else ""
    said = [_plain(published.description)] if published and published.description else []
    whole = "" if kind == "vlm" else " Bill, curves and examples are of the whole VLM that it was trained in."
    return "\n\n".join([*said, f"{_WHAT[kind]}{joined}{came if kind != 'adapter' else ''}. Made with vpgtrans.{whole}"])


def _parts(manifest: dict[str, Any]) -> str:
    parts, llm, lineage = manifest["parts"], manifest["llm"], manifest["lineage"]
    encoder, projector = parts["encoder"], parts["projector"]
    weights = f"from `{encoder['reference']}`" if encoder["reference"] else "carried along"
    revision = f", revision {llm['revision']}" if llm.get("revision") else ""
    trained = "weights carried along" if llm["trained"] else "as it is"
    adapted = ", with a LoRA adapter" if llm["adapter"] else ""
    norm = " with an output norm" if projector["norm"] else ""
    source = lineage.get("source_vpg")
    rows = [
        ("source VPG", f"`{source}`, trained with `{lineage.get('source_llm')}`" if source else "trained from scratch"),
        ("LLM", f"`{llm['reference']}`{revision}: {trained}{adapted}"),
        ("encoder", f"{encoder['kind']}, {encoder['image_size']} px, weights {weights}"),
        ("connector", f"{parts['connector']['kind']}: {manifest['visual_tokens']} visual tokens of width "
                      f"{parts['connector']['width']}"),
        ("projector", f"{projector['kind']}{norm}, {projector['width_in']} → {projector['width_out']}"),
        ("projector's start", _plain(str(lineage.get("initialiser", fmt.NOTHING)))),
        ("prompt", _code(manifest["prompt"]["template"])),
    ]  # fmt: skip
    return _table(("", ""), rows)


# --- what it took ---------------------------------------------------------------------------------


def _bill(files: RunFiles) -> str:
    summary = files.summary
    stages = [stage for stage in summary.get("stages") or [] if isinstance(stage, dict)]
    rows: list[Sequence[str]] = []
    if (converter := summary.get("converter") or {}).get("shared_tokens") is not None:
        tokens = f"word converter, {fmt.count(converter['shared_tokens'])} shared tokens"
        rows.append((tokens, "", "", "", fmt.duration(converter.get("seconds")), ""))
    for stage in stages:
        figures = (fmt.count(stage.get("samples")), fmt.count(stage.get("updates")), fmt.duration(stage.get("seconds")))
        rows.append((_plain(str(stage.get("name"))), _trained(files, stage.get("name")), *figures,
                     fmt.decimal(stage.get("val_loss"))))  # fmt: skip
    seen = fmt.count(sum(stage["samples"] for stage in stages if fmt.is_number(stage.get("samples"))))
    total = (fmt.duration(summary.get("seconds")), fmt.decimal(summary.get("val_loss")))
    rows.append(("**in all**", "", seen, "", *total))
    machine = files.environment or {}
    gpus = ", ".join(machine.get("gpus") or []) or f"{machine.get('cores', '?')} CPU cores"
    peak = fmt.size(summary.get("peak_memory_bytes"))
    table = _table(("", "trains", "samples", "updates", "time", "validation loss"), rows, numbers=4)
    return f"## The bill\n\n{table}\n\nOn {gpus}; at most {peak} of memory."


def _trained(files: RunFiles, stage: Any) -> str:
    """The parts that a stage trains."""
    parts = [row for row in files.trainable or [] if row.get("stage") == stage and row.get("mode") != "frozen"]
    return ", ".join(f"{row['part']} ({row['mode']})" if row["mode"] != "full" else str(row["part"]) for row in parts)


def _curves(files: RunFiles, pictures: dict[str, bytes]) -> str:
    curves = run_curves(files.metrics or [])
    if not (curves.validation or curves.train):
        return ""
    name = f"{PICTURES}/curves.png"
    pictures[name] = run_png(curves)
    said = "Loss by samples seen"
    if curves.best is not None:
        said += f": best {fmt.decimal(curves.best[1])} after {fmt.count(curves.best[0])} samples"
    return f"## How it learnt\n\n![{said}]({name})"


def _examples(files: RunFiles, pictures: dict[str, bytes]) -> str:
    rows: list[Sequence[str]] = []
    for sample in files.samples or []:
        found = image_bytes(files.path, sample.get("image"))
        if found is None:
            continue
        name = f"{PICTURES}/example-{len(rows) + 1}.{'jpg' if found[1] == 'jpeg' else 'png'}"
        pictures[name] = found[0]
        said = (_caption(sample.get(key)) for key in ("reference", "before", "after"))
        rows.append((f"![example {len(rows) + 1}]({name})", *said))
        if len(rows) == _EXAMPLES:
            break
    if not rows:
        return ""
    table = _table(("image", "right", "before training", "now"), rows)
    return f"## Examples\n\nHeld-out images, drawn at random and not chosen:\n\n{table}"


def _metrics(
    manifest: dict[str, Any], files: RunFiles | None, published: Publication | None
) -> tuple[Metric, ...] | list[Metric]:
    if published is not None:
        return published.metrics
    return [] if files is None else metrics_of(files)


def metrics_of(files: RunFiles) -> list[Metric]:
    """What a run measured on its own validation data."""
    sources = [source for source in (files.settings.get("data") or {}).get("validation") or [] if "dataset" in source]
    data = " + ".join(str(source["dataset"]) for source in sources) or "validation"
    splits = {source.get("split") for source in sources}
    split = splits.pop() if len(splits) == 1 else None
    return as_metrics(files.summary.get("metrics") or {}, data=data, split=split)


def as_metrics(scores: dict[str, Any], *, data: str, split: str | None) -> list[Metric]:
    """Scores of one data set, as `evaluate` gives them, as figures of an entry."""
    intervals, count = scores.get("intervals") or {}, scores.get("count")
    return [
        Metric(name=name, value=value, data=data, split=split, count=count or None, interval=intervals.get(name))
        for name, value in scores.items()
        if isinstance(value, float) and fmt.is_number(value)
    ]


def _scores(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return ""
    rows = []
    for metric in metrics:
        key = metric.name
        on = f"{_plain(metric.data)}{f' ({_plain(metric.split)})' if metric.split else ''}"
        ends = fmt.interval(key, metric.interval).strip("[]") or fmt.NOTHING
        rows.append((_plain(fmt.metric_name(key)), on, fmt.metric(key, metric.value), ends, fmt.count(metric.count)))
    table = _table(("", "data", "value", "95 % interval", "samples"), rows, numbers=3)
    how = "\n\nIntervals by bootstrap over the samples." if any(metric.interval for metric in metrics) else ""
    return f"## On held-out images\n\n{table}{how}"


# --- how to use it --------------------------------------------------------------------------------


def _use(manifest: dict[str, Any], published: Publication | None) -> str:
    """Only what is true of this checkpoint."""
    kind = published.kind if published else "vlm"
    where = f"registry:{published.name}" if published else "path/to/this/directory"
    if published and published.hub:
        where = f"hf:{published.hub}"
    llm = manifest["llm"]
    blocks = []
    if kind in ("vlm", "vpg"):
        blocks.append(_python("With vpgtrans:", f"""
import vpgtrans as vt

vlm = vt.load({_quoted(where)})
print(vlm.generate(["picture.png"]))
"""))  # fmt: skip
        move = f"source: {{vpg: {_quoted(where)}}}\ntarget: {{llm: ORG/REPO}}"
        blocks.append(
            f"To move it to another LLM, name it in a recipe (`vpgtrans transfer RECIPE`):\n\n```yaml\n{move}\n```"
        )
    else:
        blocks.append(_python("With vpgtrans, on a VLM with the same LLM (another one is refused):", f"""
import vpgtrans as vt

vlm = vt.load("path/to/a/vlm", {kind}={_quoted(where)})
print(vlm.generate(["picture.png"]))
"""))  # fmt: skip
    if llm["adapter"] and kind in ("vlm", "adapter"):
        blocks.append(_with_peft(llm, published))
    if llm["trained"]:
        blocks.append(_python("The LLM alone, with transformers:", """
from transformers import AutoModelForCausalLM

llm = AutoModelForCausalLM.from_pretrained("path/to/this/directory/llm")
"""))  # fmt: skip
    return "\n\n".join(["## Use", *blocks])


def _with_peft(llm: dict[str, Any], published: Publication | None) -> str:
    """The adapter on its base by peft alone; peft doesn't check that it is the right one."""
    if repo := hub_name(llm["reference"]):
        revision = f", revision={_quoted(llm['revision'])}" if llm.get("revision") else ""
        opened = ("from transformers import AutoModelForCausalLM",
                  f"AutoModelForCausalLM.from_pretrained({_quoted(repo)}{revision})")  # fmt: skip
    elif llm["reference"].startswith("pip:") or llm["reference"].endswith(".gguf"):
        opened = ("from vpgtrans.llm import open_llm", f"open_llm({_quoted(llm['reference'])}).model")
    else:
        opened = ("from transformers import AutoModelForCausalLM",
                  f"AutoModelForCausalLM.from_pretrained({_quoted(llm['reference'])})")  # fmt: skip
    adapter = '"path/to/this/directory/adapter"'
    if published and published.hub:
        adapter = f'"{published.hub}", subfolder="adapter"'
    return _python("The LLM with its adapter alone (no images), with peft, which does not check that the base is "
                   "the right one:", f"""
from peft import PeftModel
{opened[0]}

llm = {opened[1]}
llm = PeftModel.from_pretrained(llm, {adapter})
""")  # fmt: skip


def _terms(manifest: dict[str, Any], published: Publication | None) -> str:
    if published is None:
        return ""
    licence = published.licence
    lines = [f"The files here: **{_plain(licence.spdx)}**."]
    rows: list[Sequence[str]]
    if licence.bases:
        rows = [(_code(base.of), _plain(_said(base.licence))) for base in licence.bases]
        lines.append(f"What it stands on has terms of its own:\n\n{_table(('base', 'licence'), rows)}")
    if published.data:
        used = [
            (_code(use.name), _plain(use.split or fmt.NOTHING), _plain(_said(use.licence))) for use in published.data
        ]
        lines.append(f"Trained on:\n\n{_table(('data', 'split', 'licence'), used)}")
    return "\n\n".join(["## Licence and data", *lines])


def _said(licence: str | None) -> str:
    return "not known" if licence in (None, "NOASSERTION") else str(licence)


def _again(files: RunFiles) -> str:
    if not files.recipe:
        return ""
    scratch = isinstance((files.settings.get("source") or {}).get("vpg"), dict)
    machine = files.environment or {}
    versions = [f"{name} {version}" for name, version in (machine.get("versions") or {}).items() if version]
    said = sentence([*versions, *([f"Python {machine['python']}"] if machine.get("python") else [])])
    made = f"\n\nIt was made with {said}." if said else ""
    recipe = files.recipe.strip()
    fence = "`" * (2 + max([1, *(len(run) for run in re.findall("`+", recipe))]))
    command = f"vpgtrans {'train' if scratch else 'transfer'} recipe.yaml"
    return f"## Make it again\n\n`{command}`, with this recipe:\n\n{fence}yaml\n{recipe}\n{fence}{made}"


# --- Markdown -------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Text that stays text in Markdown, also in a cell of a table."""
    return _MARKUP.sub(lambda found: f"\\{found.group()}", _printable(" ".join(text.split())))


def _printable(text: str) -> str:
    """What a model says may hold what moves a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _caption(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        return fmt.NOTHING
    line = " ".join(text.split())
    return _plain(line if len(line) <= _LONGEST else line[: _LONGEST - 2] + " …")


def _code(text: str) -> str:
    """One line of code; what would end it, or the cell of a table, is replaced."""
    return "`" + _printable(text.replace("\n", "⏎").replace("`", "'").replace("|", "¦")) + "`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int = 0) -> str:
    """numbers: how many of the last columns are right-aligned."""
    lines = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, lines, *rows])


def _quoted(text: str) -> str:
    """A string of Python and of YAML."""
    return json.dumps(text, ensure_ascii=False)


def _python(said: str, code: str) -> str:
    return f"{said}\n\n```python\n{code.strip()}\n```"
