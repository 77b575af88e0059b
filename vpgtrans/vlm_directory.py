"""A VLM on disk: parts side by side, a manifest with a hash for every file, loaded strictly.

manifest.json                      what belongs together, and sha256 of every file
encoder/ connector/ projector/     config.json + model.safetensors (an encoder may be a reference with a hash)
adapter/                           a PEFT adapter, loadable by peft alone
llm/                               only where the LLM itself was trained in full
README.md card/                    the model card and its pictures, which the manifest doesn't list
"""

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError

from vpgtrans.adapters import base_state, is_adapted, merge, open_adapter
from vpgtrans.config import ConnectorConfig, EncoderConfig, PromptConfig
from vpgtrans.errors import CheckpointError, IntegrityError, ReferenceError_
from vpgtrans.files import sync
from vpgtrans.fingerprint import Fingerprint, check_base, embeddings_sha256
from vpgtrans.llm import open_llm
from vpgtrans.parts import load_strict, read_config, read_weights, save_part
from vpgtrans.projector import Projector
from vpgtrans.quantise import SUPPORTED, has_bitsandbytes
from vpgtrans.references import Resolved, file_sha256, pinned, resolve
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM

_LOGGER = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass
class Vision:
    """The parts of a VLM before its LLM, and what the manifest says of them."""

    vpg: VPG
    projector: Projector
    prompt: PromptConfig
    fingerprint: Fingerprint
    """Of the LLM that the projector belongs to."""
    manifest: dict[str, Any]


def save_vlm(
    vlm: VLM,
    directory: Path,
    *,
    lineage: dict[str, Any],
    encoder_trained: bool = False,
    llm_trained: bool = False,
) -> Path:
    """Write a VLM directory, beside its place first, so that it is there whole or not at all.

    An adapter in the encoder becomes part of its weights.

    Args:
        lineage: source VPG, source LLM, recipe hash, parent.
        encoder_trained: write the encoder's weights even if a reference names them.
        llm_trained: write the LLM's weights; otherwise it is a reference, with an adapter if there is one.
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_vlm(vlm, temporary, lineage=lineage, encoder_trained=encoder_trained, llm_trained=llm_trained)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    sync(directory.parent)
    return directory


def _write_vlm(vlm: VLM, temporary: Path, *, lineage: dict[str, Any], encoder_trained: bool, llm_trained: bool) -> None:
    encoder = vlm.vpg.encoder
    if is_adapted(encoder):
        merge(encoder)  # in memory too: what was saved and loaded again gives the same
    by_reference = not encoder_trained and encoder.reference_sha256 is not None
    encoder_config = {"encoder": encoder.config.model_dump(mode="json"), "sha256": encoder.reference_sha256}
    save_part(temporary / "encoder", encoder_config, state=None if by_reference else encoder.state_dict())
    connector = vlm.vpg.connector
    connector_config = {
        "connector": connector.config.model_dump(mode="json"),
        "width_in": encoder.width,
        "patches": connector.patches,
    }
    save_part(temporary / "connector", connector_config, state=connector.state_dict())
    vlm.projector.save(temporary / "projector")
    model: Any = vlm.language_model
    adapted = isinstance(model, PeftModel)
    if adapted:
        # Not "auto": peft would look the base up on the hub, to see if its vocabulary has grown.
        model.save_pretrained(temporary / "adapter", save_embedding_layers=False)
        (temporary / "adapter" / "README.md").unlink()  # an empty form that names where the base lies on this machine
    if llm_trained:
        base = model.get_base_model() if adapted else model
        base.save_pretrained(temporary / "llm", state_dict=base_state(base))
        vlm.llm.tokenizer.save_pretrained(temporary / "llm")
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "format_version": FORMAT_VERSION,
        "parts": {
            "encoder": {
                "kind": encoder.config.kind,
                "reference": encoder.config.reference if by_reference else None,
                "weights_sha256": encoder.reference_sha256 if by_reference else None,
                "image_size": encoder.config.image.size,
                "patches": encoder.patches,
                "width": encoder.width,
            },
            "connector": {"kind": connector.config.kind, "tokens": vlm.vpg.tokens, "width": vlm.vpg.width},
            "projector": {
                "kind": vlm.projector.config.kind,
                "norm": vlm.projector.config.norm,
                "width_in": vlm.projector.width_in,
                "width_out": vlm.projector.width_out,
            },
        },
        "files": {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in files
        },
        "llm": _fingerprint(vlm, trained=llm_trained).to_json()
        | {"trained": llm_trained, "adapter": adapted}
        | ({} if vlm.llm.quantised is None else {"quantised": vlm.llm.quantised}),
        "visual_tokens": vlm.vpg.tokens,
        "prompt": vlm.prompt.model_dump(mode="json"),
        "lineage": lineage,
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    for path in [*files, temporary / MANIFEST, *(path.parent for path in files)]:
        sync(path)


def _fingerprint(vlm: VLM, *, trained: bool) -> Fingerprint:
    """Of the LLM as it is written: where it was trained in full, its weights are no longer the reference's."""
    if not trained:
        return vlm.llm.fingerprint
    model: Any = vlm.language_model
    table = model.get_input_embeddings().weight
    # the weights lie beside the manifest, which has their hash
    return replace(vlm.llm.fingerprint, embeddings_sha256=embeddings_sha256(table), weights_sha256=None)


def load_vision(reference: str, *, encoder_weights: bool = True) -> Vision:
    """Read VPG and projector of a VLM directory, a run or a registry entry; the LLM is not opened.

    Args:
        encoder_weights: False leaves an encoder that the directory only refers to with random weights: its reference,
            which may be gigabytes, is not opened.

    Raises:
        ReferenceError_: the reference is no VLM directory.
        CheckpointError: a file or tensor is missing, extra, mis-shaped or altered.
    """
    found = _vlm_directory(reference)
    directory = found.path
    manifest = read_manifest(directory)
    if (kind := manifest.get("kind", "vlm")) in ("projector", "adapter"):
        raise ReferenceError_(f"{reference} is {kind} alone: it goes into a VLM that has the same LLM, as `{kind}` of "
                              "vpgtrans.load")  # fmt: skip
    try:
        encoder_written = read_config(directory / "encoder")
        encoder_config = TypeAdapter(EncoderConfig).validate_python(encoder_written["encoder"])
        connector_written = read_config(directory / "connector")
        connector_config = TypeAdapter(ConnectorConfig).validate_python(connector_written["connector"])
        prompt = PromptConfig.model_validate(manifest["prompt"])
        fingerprint = _written_fingerprint(manifest)
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{directory}: a config is malformed: {error}") from error
    carried = (directory / "encoder" / "model.safetensors").exists()
    encoder = encoders.build(encoder_config, load_weights=encoder_weights and not carried)
    if carried:
        load_strict(encoder, read_weights(directory / "encoder"), where=str(directory / "encoder"))
    elif encoder_weights and encoder.reference_sha256 != encoder_written["sha256"]:
        raise IntegrityError(
            f"{directory}: the encoder from {encoder_config.reference} has the hash {encoder.reference_sha256}, "
            f"this VPG was trained with {encoder_written['sha256']}"
        )
    made_for = int(connector_written.get("patches", encoder.patches))
    connector = connectors.build(
        connector_config,
        width_in=encoder.width,
        patches=made_for,
        grid=encoder.square if made_for != encoder.patches else None,
    )
    load_strict(connector, read_weights(directory / "connector"), where=str(directory / "connector"))
    projector = Projector.load(directory / "projector", dtype=torch.float32)  # stored smaller, computed in float32
    vpg = VPG(encoder, connector).eval().requires_grad_(False)
    return Vision(vpg, projector, prompt, fingerprint, manifest)


def load_vlm(
    reference: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    projector: str | None = None,
    adapter: str | None = None,
    force: bool = False,
) -> VLM:
    """Open a VLM: a VLM directory, a run, or `registry:NAME`.

    Args:
        reference: as in the recipe. dtype: of the LLM, bf16 if None; the parts before it keep theirs.
        projector, adapter: references to others that take the place of its own, published alone or in a VLM.
        force: take the LLM even if it is not the one that the projector or adapter was trained for.

    Raises:
        ReferenceError_: it doesn't resolve. CheckpointError: damaged. IntegrityError: the LLM is not the one that
            the projector was trained for.
    """
    vision = load_vision(reference)
    directory = _vlm_directory(reference).path
    described = vision.manifest["llm"]
    base = pinned(described["reference"], described["revision"])
    name = str(directory / "llm") if described["trained"] else base
    quantised = described.get("quantised")  # by what trained it
    if quantised is not None and not (has_bitsandbytes() and torch.device(device).type in SUPPORTED):
        _LOGGER.warning(
            "%s was trained on an LLM in %s; here, without bitsandbytes, it is opened as it is, and answers may differ "
            "a little (pip install 'vpgtrans[quantised]')", directory, quantised,
        )  # fmt: skip
        quantised = None
    llm = open_llm(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantise=quantised)
    if not described["trained"]:
        check_base(vision.fingerprint, llm.fingerprint, where=str(directory), force=force)
    if projector is not None:
        place = _part_of(projector, "projector", llm.fingerprint, force=force)
        vision.projector = Projector.load(place, dtype=torch.float32)
    if adapter is not None:
        llm.model = open_adapter(llm.model, _part_of(adapter, "adapter", llm.fingerprint, force=force))
    elif described["adapter"]:
        llm.model = open_adapter(llm.model, directory / "adapter")
    vlm = VLM(vision.vpg, vision.projector, llm, prompt=vision.prompt)
    return vlm.to(device).eval().requires_grad_(False)


def _part_of(reference: str, part: str, base: Fingerprint, *, force: bool) -> Path:
    """Where a part lies that was published alone or in a VLM, once its LLM is known to be the one at hand."""
    directory = _vlm_directory(reference).path
    manifest = read_manifest(directory)
    if not (directory / part).is_dir():
        raise ReferenceError_(f"{reference} holds no {part}; it is a {manifest.get('kind', 'vlm')}")
    try:
        expected = _written_fingerprint(manifest)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: what it says of the LLM is malformed: {error}") from error
    check_base(expected, base, where=str(directory), force=force)
    return directory / part


def _written_fingerprint(manifest: dict[str, Any]) -> Fingerprint:
    fields = {key: value for key, value in manifest["llm"].items() if key not in ("trained", "adapter", "quantised")}
    return Fingerprint.from_json(fields)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after presence, size and hash of every part's files were checked.

    Cards, dotfiles and what else lies beside the parts (.gitattributes, a licence) may come, go and change.

    Raises:
        CheckpointError: naming the parts' files that are missing, extra or altered.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}; this vpgtrans reads version {FORMAT_VERSION}")
    expected = {name for name in files if in_part(Path(name))}
    relative = (file.relative_to(directory) for file in directory.rglob("*") if file.is_file())
    present = {path.as_posix() for path in relative if in_part(path)}
    problems = [f"{name} is missing" for name in sorted(expected - present)]
    problems += [f"{name} is not in the manifest" for name in sorted(present - expected)]
    for name in sorted(present & expected):
        file = directory / name
        if file.stat().st_size != files[name]["size"] or file_sha256(file) != files[name]["sha256"]:
            problems.append(f"{name} was altered (its size or sha256 is not the manifest's)")
    if problems:
        raise CheckpointError(f"{directory}: {'; '.join(problems)}")
    return manifest


def in_part(path: Path) -> bool:
    """Whether a file, by its path below the VLM directory, is a part's config or weights."""
    hidden = any(name.startswith(".") for name in path.parts)
    return len(path.parts) > 1 and not hidden and path.name != "README.md" and path.parts[0] != "card"


def _vlm_directory(reference: str) -> Resolved:
    found = resolve(reference)
    if found.kind != "vlm":
        raise ReferenceError_(
            f"{reference} is no VLM directory: {found.path} has no {MANIFEST}; right would be a directory that "
            "`vpgtrans transfer` or `train` wrote (its vlm/), a run, or registry:NAME"
        )
    return found
