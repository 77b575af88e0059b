"""A run on disk: who may write where, and the files that say what happened."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vpgtrans.errors import OutputError
from vpgtrans.files import alone, appearing
from vpgtrans.processes import first_process
from vpgtrans.recipe import Recipe, dump, load_recipe
from vpgtrans.status import Status

_RECIPE, _ENVIRONMENT = "recipe.yaml", "environment.json"
_LOCK = ".lock"
_BEGINNING = ".beginning"
"""Stands in a directory while an earlier run is removed and a new one's first files are written: what lies beside it
is no run."""
_VERSIONS = ("vpgtrans", "torch", "transformers", "peft", "lightning", "datasets", "numpy")


class RunDirectory:
    """The directory of one run.

    recipe.yaml  environment.json  inputs.json  status.json  metrics.jsonl  metrics.csv  initialisers.json
    start.json  trainable.json  lineage.json  data.json  quarantine.jsonl  samples.json  summary.json  report.html
    checkpoints/  vlm/
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.vlm = path / "vlm"
        self.status = Status()

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file, whole or not at all; the first process alone does."""
        if not first_process():
            return
        with appearing(self.path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read(self, name: str) -> Any:
        """A JSON file; None where there is none, or none that can be read."""
        return _read(self.path / name)

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Within the block no other process trains here; the first process alone owns it.

        Raises:
            OutputError: another one does, or the directory can't be written.
        """
        if not first_process():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / _LOCK).touch()
        except OSError as error:
            raise OutputError(f"{self.path} can't be written: {error.strerror or error}") from error
        with alone(self.path / _LOCK, busy=f"{self.path}: another process is writing this run; wait for it, or end it"):
            yield


def check_run(
    recipe: Recipe, output: Path | None, *, resume: bool, overwrite: bool, may_differ: Collection[str] = ()
) -> Path:
    """Where a recipe's run goes; nothing is written yet.

    Args:
        may_differ: key paths in which the recipe of a resumed run may differ from the one it was begun with; `*`
            stands for a number.

    Raises:
        OutputError: it holds another run or something else, or there is nothing to resume.
    """
    path = output or Path("runs") / recipe.name
    if not first_process():
        return path
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; the output must be a directory")
    present = _present(path)
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
        wrong = [key for key in differ if not any(fnmatchcase(key, said) for free in may_differ
                                                  for said in (free, f"{free}.*"))]  # fmt: skip
        if wrong:
            but = f" but for {', '.join(may_differ)}" if may_differ else ""
            begun = (_read(path / _ENVIRONMENT) or {}).get("command")
            raise OutputError(
                f"{path} was begun with another recipe (differs in {', '.join(wrong)}); resume needs the same one, "
                f"overrides included{but} (it was begun by: {begun})"
            )
    return path


def create_run(recipe: Recipe, path: Path, *, resume: bool, inputs: Any = None) -> RunDirectory:
    """The run directory, emptied and with its first files unless an earlier start is continued.

    Of one that is continued recipe.yaml becomes what it goes on with, as far as `check_run` lets that differ. Whenever
    the process ends, what is left is the earlier run, a whole new one, or nothing that `check_run` takes for a run.

    Args:
        inputs: content of inputs.json, if that is to be there.

    Raises:
        OutputError: it can't be written.
    """
    run = RunDirectory(path)
    if not first_process():
        return run
    try:
        if not resume:
            path.mkdir(parents=True, exist_ok=True)
            (path / _BEGINNING).touch()
            _empty(path)
            run.write(_ENVIRONMENT, environment())
        if inputs is not None:
            run.write("inputs.json", inputs)
        with appearing(path / _RECIPE) as temporary:
            temporary.write_text(dump(recipe))
        (path / _BEGINNING).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} can't be written: {error.strerror or error}") from error
    return run


def _present(path: Path) -> bool:
    """Whether a directory holds anything, a run that was only being begun left out."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    return _BEGINNING not in names and bool(names - {_LOCK})


def _empty(path: Path) -> None:
    """Remove all but what says that a run begins."""
    for file in path.iterdir():
        if file.name in (_BEGINNING, _LOCK):
            continue
        if file.is_dir() and not file.is_symlink():
            shutil.rmtree(file)
        else:
            file.unlink()


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


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
