"""What `transfer` and `train` share: their options, and what they print when a run is done."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vpgtrans.cli import console
from vpgtrans.cli.options import check_output, device_option, json_option, output_options, read_recipe, recipe_arguments
from vpgtrans.processes import first_process

SAMPLES_SHOWN = 6


def training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every option of a verb that trains."""
    function = json_option(function)
    function = device_option(function)
    function = click.option(
        "--dry-run", is_flag=True, help="Load and join everything, print what would train, and stop before training."
    )(function)
    return recipe_arguments(output_options(function))


def run(
    verb: str,
    recipe: Path,
    overrides: Sequence[str],
    *,
    output: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    device: str,
    as_json: bool,
) -> None:
    """Check the arguments, call `vpgtrans.runs.<verb>`, show the result."""
    check_output(resume=resume, overwrite=overwrite)
    checked = read_recipe(recipe, overrides)
    with console.loading():
        from vpgtrans import runs
    call = runs.transfer if verb == "transfer" else runs.train
    done = call(checked, output=output, resume=resume, overwrite=overwrite, dry_run=dry_run, device=device)
    if not first_process():
        return  # the first one shows what the run came to
    show(done, as_json=as_json, dry_run=dry_run)


def show(path: Path, *, as_json: bool, dry_run: bool) -> None:
    """The summary of a finished run, captions it wrote, and where to look."""
    summary_file = path / "summary.json"
    if dry_run or not summary_file.is_file():
        if as_json:
            console.print_json({"output": str(path), "dry_run": dry_run})
        return
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    if as_json:
        console.print_json({**summary, "output": str(path)})
        return
    from vpgtrans.progress import duration  # loads rich, which a help page does without

    console.print_pairs(_readable(summary), title=f"run {path}")
    stages = [
        {key: stage.get(key) for key in _STAGE} | {"time": duration(stage["seconds"])} for stage in summary["stages"]
    ]
    console.print_rows(stages, title="stages")
    samples = [row for row in _read(path / "samples.json")[:SAMPLES_SHOWN] if isinstance(row, dict)]
    if samples:
        shown = [{key: _line(row.get(key)) for key in ("reference", "before", "after")} for row in samples]
        console.print_rows(shown, title="captions of images it has not seen")
    for name, what in (("vlm", "model"), ("report.html", "report")):
        if (path / name).exists():
            click.echo(f"{what}: {path / name}")
    if (path / "vlm").exists():
        click.echo(f"try it: vpgtrans caption {path / 'vlm'} IMAGE")


_STAGE = ("name", "updates", "samples", "val_loss")


def _readable(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary in a reader's words and units; `--json` has all of it."""
    from vpgtrans.progress import duration

    metrics, converter = summary["metrics"], summary["converter"]
    shown: dict[str, Any] = {
        "first projector": summary["initialiser"],
        "validation loss": f"{summary['val_loss']:.3f} nats a token",
        "held-out captions": f"token F1 {metrics['token_f1']:.2f}, exact {metrics['exact_match']:.0%}, "
        f"CIDEr {metrics['cider']:.2f} ({metrics['count']} images)"
        if metrics["count"]
        else None,
        "time": duration(summary["seconds"]),
        "peak memory": f"{summary['peak_memory_bytes'] / 2**30:.1f} GiB",
    }
    if converter["shared_tokens"] is not None:
        shown["word converter"] = f"{converter['shared_tokens']:,} shared tokens, {converter['seconds']:.1f} s"
    return shown


def _line(text: Any) -> str:
    """The first line of a text, which is where an untrained model says something, if anything."""
    lines = str(text or "").strip().splitlines()
    return (lines[0] + (" …" if len(lines) > 1 else "")) if lines else ""


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))
    return rows if isinstance(rows, list) else []
