"""`registry publish` and `yank`: from a run to an entry that others can trust.

What is published is put together first, loaded, and compared with the run; then it is written to its store and read
back; the index names it last. Wherever this is cut off, the index is as it was, and the same command can be given
again.
"""

import contextlib
import hashlib
import io
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from vpgtrans import __version__
from vpgtrans.errors import IntegrityError, OutputError, ReferenceError_, RegistryError
from vpgtrans.references import cache_dir, resolve
from vpgtrans.registry import edit
from vpgtrans.registry.describe import describe
from vpgtrans.registry.entry import SCHEMES, Entry, Kind, Metric, safe_location
from vpgtrans.registry.licences import terms
from vpgtrans.registry.secrets import check_text, check_texts
from vpgtrans.registry.stores import location_of, open_store
from vpgtrans.report import format as fmt
from vpgtrans.report.card import Publication, as_metrics, metrics_of, model_card
from vpgtrans.report.read import RunFiles, image_bytes, read_run
from vpgtrans.runs.parts import open_vlm
from vpgtrans.runs.staging import stage
from vpgtrans.runs.use import dataset_and_split, evaluate

log = logging.getLogger(__name__)

_COMPARED = 4
"""Images whose logits are compared."""
_EXACT, _ROUNDED = 1e-3, 0.5
"""Largest difference of logits, in standard deviations of them: of the same weights, and of weights in bf16."""


@dataclass(frozen=True)
class Published:
    """What came of it."""

    entry: Entry
    index: Path
    difference: float
    """The largest between the run's logits and those of what was written, in standard deviations of the run's."""


@dataclass(frozen=True)
class _Source:
    """What is published, and what is known of it."""

    directory: Path
    """The VLM directory."""
    files: RunFiles | None
    """The run around it, if there is one."""

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.files is None else self.files.settings


def publish(
    run: str | Path,
    *,
    to: str | Path,
    index: str | Path | None = None,
    id: str | None = None,
    version: str = "1.0.0",
    kind: Kind = "vlm",
    licence: Sequence[str] = (),
    description: str | None = None,
    measure: Sequence[str] = (),
    half: bool = False,
    base_model: str | None = None,
    dry_run: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Published:
    """Publish a run's result, or a VLM directory, or one part of it.

    Args:
        to: where its files go: a directory, oci:HOST/REPO:TAG, hf:ORG/REPO, or a URL such as s3://BUCKET/PATH.
        index: the file that names it; the first of `VPGTRANS_REGISTRY` or at hand if None.
        id: the recipe's name if None.
        licence: SPDX for the files, NAME=SPDX for data and bases; may be left out where all is known and the same.
        measure: data sets as `evaluate` takes them, whose scores go into entry and card in place of the run's own.
        half: store connector and projector in bf16.
        base_model: ORG/REPO of the LLM on the hub, where its reference doesn't say so.
        dry_run: check and compare everything, write nothing.

    Raises:
        RegistryError: an id with its version is there already; a licence is not known; a text holds a token; a name, a
            location or an index is wrong. IntegrityError: what was written is not what the run has. StoreError: the
            store can't be reached. The rest as `load_vlm` and `evaluate`.
    """
    source = _source_of(str(run))
    place = edit.writable_index(None if index is None else str(index))
    destination, hub = _destination(str(to), place)
    with _scratch() as scratch:
        staging = scratch / "checkpoint"
        manifest = stage(source.directory, staging, kind=kind, half=half)
        own, data = terms(manifest, source.settings, licence)
        facts: dict[str, Any] = {
            "id": id or _slug(str(manifest["lineage"].get("recipe") or source.directory.name)),
            "version": version,
            "description": " ".join((description or _described(manifest)).split()),
            "licence": own,
            "data": data,
            "locations": (destination,),
            "code_version": _code_version(source.files),
        }
        _warn_of_paths(manifest)
        # What is wrong with names, texts and the index is found before a model is opened.
        draft = describe(staging, manifest, **facts)
        edit.check_new(place, draft)
        _check_base_model(base_model)
        difference = _compare(source, staging, kind, half=half, device=device, trust_remote_code=trust_remote_code)
        facts["metrics"] = _metrics(source, staging, kind, measure, device=device, trust_remote_code=trust_remote_code)
        publication = Publication(
            draft.name, kind, draft.description, own, data, facts["metrics"], hub=hub, base_model=base_model
        )
        model_card(manifest, source.files, publication).write(staging)
        entry = describe(staging, manifest, **facts)
        check_texts(staging, [file.path for file in entry.files])
        check_text(edit.dump(entry), where=f"the entry {entry.name}")
        if dry_run:
            edit.check_new(place, entry)
            return Published(entry, place, difference)
        log.info("writing %s, %s", entry.name, fmt.size(entry.size))
        location = open_store(destination, index=str(place)).write(staging, entry.files)
        entry = Entry.model_validate(entry.model_dump() | {"locations": (location,)})
        _read_back(entry, place)
    edit.append(place, entry)
    return Published(entry, place, difference)


# --- from where, to where -------------------------------------------------------------------------


def _source_of(reference: str) -> _Source:
    found = resolve(reference)
    if found.kind != "vlm":
        raise ReferenceError_(
            f"{reference} is nothing to publish; right would be a run that is complete, or a VLM directory"
        )
    around = found.path.parent
    is_run = found.path.name == "vlm" and (around / "summary.json").is_file()
    return _Source(found.path, read_run(around) if is_run else None)


def _destination(to: str, place: Path) -> tuple[str, str | None]:
    """The location as the entry will name it, and ORG/REPO where it is the hub."""
    scheme, colon, rest = to.partition(":")
    if not colon or scheme not in SCHEMES:
        return location_of(Path(to).expanduser(), index=str(place)), None
    try:
        safe_location(to)
    except ValueError as error:
        raise RegistryError(f"--to: {error}") from error
    return to, rest.partition("@")[0] if scheme == "hf" else None


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for what is put together, in the cache."""
    home = cache_dir() / "publishing"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{home} can't be written: {error.strerror or error}") from error
    with tempfile.TemporaryDirectory(dir=home) as name:
        yield Path(name)


def _warn_of_paths(manifest: dict[str, Any]) -> None:
    """Nobody else can open what is named by a path of this machine."""
    named = [manifest["llm"]["reference"], manifest["parts"]["encoder"]["reference"]]
    for reference in named:
        if reference and Path(reference).is_absolute():
            log.warning(
                "%s is a path of this machine: who wants to use it elsewhere must have the same there", reference
            )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "vlm"


def _described(manifest: dict[str, Any]) -> str:
    """One sentence for who doesn't give one."""
    parts, lineage, llm = manifest["parts"], manifest["lineage"], fmt.name(manifest["llm"]["reference"])
    what = {"projector": "Projector", "adapter": "LoRA adapter"}.get(manifest["kind"], "")
    eyes = f"{parts['encoder']['kind']}, {parts['connector']['kind']} with {manifest['visual_tokens']} visual tokens"
    came = (
        f"moved from {fmt.name(lineage['source_llm'])} to {llm}" if lineage.get("source_llm") else f"trained with {llm}"
    )
    return f"{what} for {llm} behind {eyes}" if what else f"{eyes}, {came}"


def _code_version(files: RunFiles | None) -> str:
    versions = ((files.environment if files else None) or {}).get("versions") or {}
    return str(versions.get("vpgtrans") or __version__)


def _check_base_model(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise RegistryError(f"--base-model {name}: right would be ORG/REPO, the LLM's name on the hub")


# --- is it what the run has -----------------------------------------------------------------------


def _compare(source: _Source, staging: Path, kind: Kind, *, half: bool, device: str, trust_remote_code: bool) -> float:
    """Load what was put together, and compare its first words with the run's.

    Raises:
        IntegrityError: they differ. As `load_vlm`.
    """
    images = _images(source.files)
    own, written = str(source.directory), str(staging)
    options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    mine = _logits(own, images, adapted=kind != "vpg", **options)
    if kind in ("vlm", "vpg"):
        own = written
    else:  # a part goes back to where it comes from
        options[kind] = written
    theirs = _logits(own, images, **options)
    difference = ((mine - theirs).abs().max() / mine.std()).item()
    limit = _ROUNDED if half else _EXACT
    if not difference <= limit:  # not a number is no equality
        raise IntegrityError(
            f"what would be published does not say what {source.directory} says: its logits are off by "
            f"{difference:.3g} standard deviations, {limit:g} is allowed; nothing was published"
        )
    return difference


def _logits(reference: str, images: Sequence[Image.Image], *, adapted: bool = True, **options: Any) -> torch.Tensor:
    """Of the first word about each image [n, V], on the CPU."""
    vlm = open_vlm(reference, **options)
    before = [vlm.question(None, [image.size]) for image in images]
    prompts = vlm.prompts(images)
    model: Any = vlm.llm.model
    if not adapted and isinstance(model, PeftModel):
        with model.disable_adapter():
            return vlm.splice.first_logits(prompts, before).cpu()
    return vlm.splice.first_logits(prompts, before).cpu()


def _images(files: RunFiles | None) -> list[Image.Image]:
    """Held-out images that the run shows; noise of two shapes where there are none."""
    if files is not None:
        found = [image_bytes(files.path, sample.get("image")) for sample in (files.samples or [])[:_COMPARED]]
        if images := [Image.open(io.BytesIO(each[0])).convert("RGB") for each in found if each is not None]:
            return images
    random = np.random.default_rng(0)
    shapes = ((96, 96, 3), (64, 128, 3))
    return [Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def _metrics(
    source: _Source, staging: Path, kind: Kind, measure: Sequence[str], *, device: str, trust_remote_code: bool
) -> tuple[Metric, ...]:
    """What is measured now, on what was put together or the VLM that a part comes from; else what the run measured."""
    if not measure:
        # Of a VPG that leaves an adapter behind nothing was measured.
        left_behind = kind == "vpg" and (source.directory / "adapter").is_dir()
        return () if source.files is None or left_behind else tuple(metrics_of(source.files))
    log.info("measuring on %s", ", ".join(measure))
    whole = staging if kind in ("vlm", "vpg") else source.directory
    found = evaluate(str(whole), data=list(measure), device=device, trust_remote_code=trust_remote_code)
    metrics: list[Metric] = []
    for name, scores in found.items():
        data, split = dataset_and_split(name)
        metrics += as_metrics(scores, data=data, split=split)
    return tuple(metrics)


def _read_back(entry: Entry, place: Path) -> None:
    """Every byte of an entry's files from where they now lie.

    Raises:
        IntegrityError: a file there is not the one that was written. StoreError: it can't be read.
    """
    store = open_store(entry.locations[0], index=str(place))
    for file in entry.files:
        digest, size = hashlib.sha256(), 0
        for chunk in store.read(file):
            digest.update(chunk)
            size += len(chunk)
            if size > file.size:
                break
        if (size, digest.hexdigest()) != (file.size, file.sha256):
            raise IntegrityError(
                f"{entry.locations[0]}: {file.path} reads back as {size} bytes with sha256 {digest.hexdigest()}, not "
                f"as the {file.size} bytes with {file.sha256} that were written; the index was not changed"
            )
