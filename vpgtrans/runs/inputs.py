"""What a run reads besides its recipe, as it was when the run was begun: its data, its models, its precision.

`inputs.json` holds it, and a resumed run is refused where one of them is another. Where they lie does not matter.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vpgtrans.config import VPGConfig
from vpgtrans.data.mixture import Mixture
from vpgtrans.data.rows import lasting_state
from vpgtrans.errors import OutputError
from vpgtrans.recipe import Recipe
from vpgtrans.references import resolve
from vpgtrans.runs.parts import llm_dtype

INPUTS = "inputs.json"
_MODEL_FILES = frozenset({".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja", ".py", ".pth"})


@dataclass(frozen=True)
class Input:
    """One of them."""

    name: str
    """As a message calls it."""
    state: str
    """Differs where the content does."""
    rows: int | None = None
    """Of a data set."""


Inputs = dict[str, Input]
"""By its key in the recipe."""


def inputs_of(recipe: Recipe, train: Mixture, validation: Mixture, *, device: torch.device) -> Inputs:
    """The inputs as they are now. Nothing is loaded: models by their files, of which large ones by some blocks.

    Raises:
        ReferenceError_: a model does not resolve.
    """
    found: Inputs = {}
    for role, mixture in (("train", train), ("validation", validation)):
        for number, source in enumerate(mixture.sources):
            found[f"data.{role}.{number}"] = Input(source.name, source.content(), len(source))
    found["target.llm"] = Input(recipe.target.llm, _model_state(recipe.target.llm))
    if not isinstance(recipe.source.vpg, VPGConfig):
        found["source.vpg"] = Input(recipe.source.vpg, _model_state(recipe.source.vpg))
    precision = str(llm_dtype(recipe.trainer, device)).removeprefix("torch.")
    found["trainer.precision"] = Input(f"{recipe.trainer.precision} ({precision})", precision)
    return found


def check_inputs(path: Path, earlier: Mapping[str, Mapping[str, object]], now: Inputs) -> None:
    """
    Args:
        path: of the run. earlier: what its inputs.json says.

    Raises:
        OutputError: an input is another one now, each by its key.
    """
    changed = []
    for key, input_ in now.items():
        before = earlier.get(key)
        if before is not None and before["state"] != input_.state:
            changed.append(f"{key}: {_change(before, input_)}")
    if changed:
        raise OutputError(
            f"{path} can't be resumed: " + "; ".join(changed) + ". Right would be what it was begun with, or a new run "
            "(--overwrite, or another --output)"
        )


def to_json(inputs: Inputs) -> dict[str, dict[str, object]]:
    """What `inputs.json` holds."""
    return {key: asdict(input_) for key, input_ in inputs.items()}


def _change(before: Mapping[str, object], now: Input) -> str:
    if now.rows is not None and before["rows"] != now.rows:
        how = f"{before['rows']} rows then, {now.rows} now"
    elif before["name"] != now.name:
        how = f"it was {before['name']} then"
    else:
        how = "its content is another"
    return f"{now.name} has changed since the run was begun ({how})"


def _model_state(reference: str) -> str:
    """Of a model's files; of a versioned one its name and version."""
    found = resolve(reference, weights=False)
    if found.revision is not None:
        return f"{reference.partition('@')[0].removeprefix('hf:')} {found.revision}"
    if found.kind == "vlm":  # its manifest holds a hash of every file, and is checked when it is loaded
        return lasting_state(found.path / "manifest.json", whole=True).hex()
    digest = hashlib.sha256()
    for name, file in _files(found.path):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + lasting_state(file, whole=True))
    return digest.hexdigest()


def _files(path: Path) -> Iterable[tuple[str, Path]]:
    if path.is_file():
        return [("", path)]
    files = sorted(file for file in path.iterdir() if file.suffix in _MODEL_FILES and not file.name.startswith("."))
    return [(file.name, file) for file in files]
