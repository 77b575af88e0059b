"""A run directory's files as plain data; what is missing stays None, what is malformed is a DataError."""

import base64
import binascii
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vpgtrans.errors import DataError

log = logging.getLogger(__name__)

_IMAGE_TYPES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds; every field but `summary` is None where its file isn't there."""

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]] | None
    initialisers: list[dict[str, Any]] | None
    trainable: list[dict[str, Any]] | None
    samples: list[dict[str, Any]] | None
    skipped: list[dict[str, Any]] | None
    lineage: dict[str, Any] | None
    environment: dict[str, Any] | None
    recipe: str | None

    @property
    def settings(self) -> dict[str, Any]:
        """recipe.yaml as a mapping; empty where it is missing or not one."""
        try:
            settings = YAML(typ="safe", pure=True).load(self.recipe or "")
        except YAMLError as error:
            log.warning("%s: not valid YAML (%s); the report says less about the run", self.path / "recipe.yaml", error)
            return {}
        return settings if isinstance(settings, dict) else {}


def read_run(run: Path) -> RunFiles:
    """Read a run (or comparison) directory.

    Raises:
        DataError: the directory or its summary.json is missing, or a file isn't what its name promises.
    """
    if not run.is_dir():
        raise DataError(f"{run}: there is no such run directory")
    if not (run / "summary.json").is_file():
        raise DataError(
            f"{run}: no summary.json, so there is nothing to report; a run writes it when it ends "
            "(continue an interrupted one with --resume)"
        )
    recipe = run / "recipe.yaml"
    return RunFiles(
        path=run,
        summary=read_mapping(run / "summary.json"),
        metrics=_lines(run / "metrics.jsonl"),
        initialisers=_rows(run / "initialisers.json"),
        trainable=_rows(run / "trainable.json"),
        samples=_rows(run / "samples.json"),
        skipped=_lines(run / "quarantine.jsonl"),
        lineage=_mapping(run / "lineage.json"),
        environment=_mapping(run / "environment.json"),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
    )


def image_uri(run: Path, image: Any) -> str | None:
    """A sample's image as a data URI, or None where it can't be shown; see `image_bytes`."""
    found = image_bytes(run, image)
    return None if found is None else f"data:image/{found[1]};base64,{base64.b64encode(found[0]).decode()}"


def image_bytes(run: Path, image: Any) -> tuple[bytes, str] | None:
    """The file of a sample's image and its type, `png` or `jpeg`; None where it can't be shown.

    `image` is a data URI, base64 text, or a path relative to the run or to its images/ folder.

    Raises:
        DataError: the path leads out of the run directory.
    """
    if not isinstance(image, str) or not image:
        return None
    data = _decode(image.partition(",")[2] if image.startswith("data:") else image)
    if data is None and not image.startswith("data:"):
        data = _read_inside(run, image)
    for magic, kind in _IMAGE_TYPES.items():
        if data and data.startswith(magic):
            return data, kind
    log.warning("%s: sample image %.60s is missing or neither PNG nor JPEG", run, image)
    return None


def _decode(text: str) -> bytes | None:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if any(data.startswith(magic) for magic in _IMAGE_TYPES) else None


def _read_inside(run: Path, relative: str) -> bytes | None:
    for base in (run, run / "images"):
        path = (base / relative).resolve()
        if not path.is_relative_to(run.resolve()):
            raise DataError(f"{run / 'samples.json'}: image {relative!r} lies outside the run directory")
        if path.is_file():
            return path.read_bytes()
    return None


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def _mapping(path: Path) -> dict[str, Any] | None:
    return read_mapping(path) if path.is_file() else None


def read_mapping(path: Path) -> dict[str, Any]:
    """The JSON object in a file that is there. Raises DataError where it holds none."""
    value = _load(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _rows(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    value = _load(path)
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path}: expected a JSON list of objects")
    return value


def _lines(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            # A process that was killed while writing leaves half a last line; any other is damage.
            if number == len(texts):
                log.warning("%s: line %d is cut off; ignored", path, number)
                continue
            raise DataError(f"{path}: line {number} is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is no JSON object")
        rows.append(row)
    return rows
