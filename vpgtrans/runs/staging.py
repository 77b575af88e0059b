"""What of a VLM directory is published: all of it, or one part with the manifest that says what it belongs to."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from vpgtrans.errors import RegistryError
from vpgtrans.parts import read_config, read_weights, save_part
from vpgtrans.references import file_sha256
from vpgtrans.registry.entry import Kind
from vpgtrans.vlm_directory import MANIFEST, in_part, read_manifest

log = logging.getLogger(__name__)

_PARTS: dict[Kind, tuple[str, ...]] = {
    "vlm": ("encoder", "connector", "projector", "adapter", "llm"),
    "vpg": ("encoder", "connector", "projector"),
    "projector": ("projector",),
    "adapter": ("adapter",),
}


def stage(directory: Path, staging: Path, *, kind: Kind, half: bool = False) -> dict[str, Any]:
    """Put the parts of a kind and their manifest, but no card, into a new directory; returns the manifest.

    half: connector and projector in bf16, half the size.

    Raises:
        RegistryError: the VLM holds no such part, or one that is worth nothing alone. CheckpointError: it is damaged.
    """
    manifest = read_manifest(directory)
    _check(manifest, kind, where=directory)
    staging.mkdir(parents=True)
    files = [name for name in manifest["files"] if in_part(Path(name)) and name.split("/")[0] in _PARTS[kind]]
    for name in files:
        _take(directory / name, staging / name)
    if half:
        for part in ("connector", "projector"):
            if (staging / part).is_dir():
                _halve(staging / part)
    llm = manifest["llm"]
    if kind == "vpg" and llm["adapter"]:
        log.warning("a VPG is published without the LLM's adapter: it is what it is with the LLM as it was")
    written = manifest | {
        "kind": kind,
        "files": {name: _described(staging / name) for name in sorted(files)},
        "llm": llm | {"adapter": llm["adapter"] and kind in ("vlm", "adapter")},
    }
    (staging / MANIFEST).write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return written


def _check(manifest: dict[str, Any], kind: Kind, *, where: Path) -> None:
    llm, is_kind = manifest["llm"], manifest.get("kind", "vlm")
    if is_kind in ("projector", "adapter"):
        raise RegistryError(f"{where} is {is_kind} alone; publish it from the VLM that it comes from")
    if kind == "adapter" and not llm["adapter"]:
        raise RegistryError(f"{where}: its LLM has no adapter that could be published (no stage trained llm: lora)")
    if kind != "vlm" and llm["trained"]:
        raise RegistryError(
            f"{where}: its LLM was trained in full, so that a {kind} alone fits no LLM that others have; publish it "
            "as vlm"
        )


def _take(source: Path, target: Path) -> None:
    """Link a file where that is possible, since it may be gigabytes; it is only read."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source.resolve(), target)  # the hub's cache holds links
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _halve(part: Path) -> None:
    state = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(part).items()
    }
    save_part(part, read_config(part), state=state)


def _described(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": file_sha256(file)}
