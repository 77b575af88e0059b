"""A run on disk: who may write where, and the files that say what happened."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vpgtrans.errors import OutputError
from vpgtrans.processes import first_process
from vpgtrans.recipe import Recipe, dump, load_recipe

_RECIPE, _ENVIRONMENT = "recipe.yaml", "environment.json"
_VERSIONS = ("vpgtrans", "torch", "transformers", "peft", "lightning", "datasets", "numpy")


class RunDirectory:
    """The directory of one run.

    recipe.yaml  environment.json  metrics.jsonl  initialisers.json  start.json  trainable.json  lineage.json
    data.json  quarantine.jsonl  samples.json  summary.json  report.html  checkpoints/  vlm/
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.vlm = path / "vlm"

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all; the first process alone does."""
        if not first_process():
            return
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        os.replace(temporary, self.path / name)

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())


def check_run(
    recipe: Recipe, output: Path | None, *, resume: bool, overwrite: bool, may_differ: Collection[str] = ()
) -> Path:
    """Where a recipe's run goes; nothing is written yet.

    Args:
        may_differ: key paths in which the recipe of a resumed run may differ from the one it was begun with.

    Raises:
        OutputError: it holds another run or something else, or there is nothing to resume.
    """
    path = output or Path("runs") / recipe.name
    if not first_process():
        return path
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; the output must be a directory")
    present = path.is_dir() and any(path.iterdir())
    # Both files: a recipe.yaml alone may be the user's own, and --overwrite deletes what else lies beside it.
    if present and not all((path / name).is_file() for name in (_RECIPE, _ENVIRONMENT)):
        raise OutputError(f"{path} holds files that are no run of vpgtrans; choose another --output")
    if present and not resume and not overwrite:
        raise OutputError(f"{path} holds a run already; give --resume, --overwrite, or another --output")
    anchor = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not anchor.is_dir() or not os.access(anchor, os.W_OK | os.X_OK):
        raise OutputError(f"{path} can't be written: no permission in {anchor}, or it is no directory")
    if resume and not present:
        raise OutputError(f"{path} holds no run to resume; leave --resume out to start one")
    if resume:
        earlier = load_recipe(path / _RECIPE).model_dump(mode="json")
        now = recipe.model_dump(mode="json")
        if earlier["prompt"] is not None:  # keys that the recipe leaves to the source were written out
            stated = {} if recipe.prompt is None else recipe.prompt.model_dump(include=recipe.prompt.model_fields_set)
            now["prompt"] = earlier["prompt"] | stated
        before, named = earlier["target"]["connector"], recipe.target.connector
        if before is not None and named is not None and before["kind"] == named.kind:  # as with the prompt
            now["target"]["connector"] = before | named.model_dump(mode="json", include=named.model_fields_set)
        differ = _differences(earlier, now)
        wrong = [key for key in differ if not any(key == free or key.startswith(f"{free}.") for free in may_differ)]
        if wrong:
            but = f" but for {', '.join(may_differ)}" if may_differ else ""
            begun = json.loads((path / _ENVIRONMENT).read_text()).get("command")
            raise OutputError(
                f"{path} was begun with another recipe (differs in {', '.join(wrong)}); resume needs the same one, "
                f"overrides included{but} (it was begun by: {begun})"
            )
    return path


def create_run(recipe: Recipe, path: Path, *, resume: bool) -> RunDirectory:
    """The run directory, emptied and with its first files unless an earlier start is continued.

    Of one that is continued recipe.yaml becomes what it goes on with, as far as `check_run` lets that differ.

    Raises:
        OutputError: it can't be written.
    """
    run = RunDirectory(path)
    if not first_process():
        return run
    try:
        if not resume:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True)
            run.write(_ENVIRONMENT, environment())
        temporary = path / f".{_RECIPE}.tmp"
        temporary.write_text(dump(recipe))
        os.replace(temporary, path / _RECIPE)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error
    return run


def environment() -> dict[str, Any]:
    """Versions, hardware, commit."""
    import torch

    found: dict[str, str | None] = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "versions": found,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package is in, if it is in one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def _differences(before: Any, after: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        return [name for key in keys for name in _differences(before.get(key), after.get(key), f"{prefix}{key}.")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [name for index, (a, b) in pairs for name in _differences(a, b, f"{prefix}{index}.")]
    return [] if before == after else [prefix.rstrip(".")]
