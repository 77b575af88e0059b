"""Is a checkpoint whole, is it what its index says, and does it fit an LLM at hand?

Files are hashed first. Then the headers of weights are compared with what configs and manifest say, so that nothing is
opened that is not what it claims to be. What a damaged checkpoint makes of a later question is not asked.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from vpgtrans.adapters import ADAPTER_WEIGHTS, adapter_state, fresh_adapter
from vpgtrans.config import ConnectorConfig, EncoderConfig
from vpgtrans.errors import CheckpointError, IntegrityError, VpgTransError
from vpgtrans.fingerprint import Fingerprint, differences
from vpgtrans.llm import open_llm, open_skeleton, read_embeddings
from vpgtrans.parts import WEIGHTS_FILE, check_fit, read_config
from vpgtrans.projector import Projector
from vpgtrans.references import file_sha256, resolve
from vpgtrans.registry.entry import Base, Entry, LLMBase
from vpgtrans.registry.index import find
from vpgtrans.registry.pull import pull
from vpgtrans.registry.safetensors_header import TensorInfo, read_header
from vpgtrans.vision import connectors, encoders
from vpgtrans.vlm_directory import MANIFEST, read_manifest

_SHOWN = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of the weights of a part; others are counts and flags, and compared by shape alone."""
_OF_LLM = tuple(name for name in LLMBase.model_fields if name != "reference")


@dataclass
class Check:
    """One question, and what speaks against a yes."""

    question: str
    problems: list[str] = field(default_factory=list)
    looked_at: str = ""
    """What was compared, in a few words."""
    asked: bool = True
    """False where an earlier answer made it pointless."""

    @property
    def fine(self) -> bool:
        return self.asked and not self.problems

    def to_json(self) -> dict[str, Any]:
        return {
            "check": self.question,
            "ok": self.fine if self.asked else None,
            "looked_at": self.looked_at,
            "problems": self.problems,
        }

    @contextmanager
    def finding(self) -> Iterator[None]:
        """Within the block an error is a problem, and no end of the other questions."""
        try:
            yield
        except VpgTransError as error:
            self.problems.append(str(error))


def locate(checkpoint: str, *, index: str | None = None) -> tuple[Path, Entry | None]:
    """The directory of a VLM directory, a run, or an entry ID[@VERSION], which is pulled if need be; and the entry.

    Raises:
        ReferenceError_, RegistryError, StoreError, IntegrityError: there is none, or it can't be had.
    """
    if Path(checkpoint).expanduser().is_dir():
        return resolve(checkpoint).path, None
    entry, place = find(checkpoint, index=index)
    return pull(entry, index=place), entry


def verify(
    directory: Path, *, entry: Entry | None = None, against: str | None = None, trust_remote_code: bool = False
) -> list[Check]:
    """Answer every question about a VLM directory.

    Args:
        entry: what an index says of it. against: an LLM that it should fit.
    """
    files = Check("files are whole")
    _check_files(files, directory, entry)
    headers = Check("weights are safetensors", asked=files.fine)
    shapes = Check("tensors are those of the configs", asked=files.fine)
    says = Check("manifest and index agree", asked=files.fine and entry is not None)
    fits = Check(f"fits {against}", asked=files.fine and against is not None)
    if files.fine:
        manifest, found = read_manifest(directory), _headers(headers, directory)
        shapes.asked, fits.asked = headers.fine, headers.fine and fits.asked
        if shapes.asked:
            _check_shapes(shapes, directory, found)
        if entry is not None:
            _check_entry(says, manifest, entry)
        if fits.asked and against is not None:
            with fits.finding():
                _check_base(fits, manifest, entry, against, trust_remote_code)
            if (adapter := found.get(f"adapter/{ADAPTER_WEIGHTS}")) is not None and not fits.problems:
                _check_adapter(fits, directory, adapter, against, trust_remote_code)
    checks = [files, headers, shapes]
    return [*checks, *([says] if entry is not None else []), *([fits] if against is not None else [])]


def passed(checks: Iterable[Check]) -> bool:
    """Whether nothing speaks against a checkpoint."""
    return not any(check.problems for check in checks)


# --- the questions ------------------------------------------------------------------------------


def _check_files(check: Check, directory: Path, entry: Entry | None) -> None:
    if entry is not None:
        check.problems += _compared(directory, entry)
        check.looked_at = f"{len(entry.files)} files, {entry.size:,} bytes: sizes and hashes of the index"
    if not check.problems:
        with check.finding():
            listed = read_manifest(directory)["files"]
            check.looked_at = check.looked_at or f"{len(listed)} files: sizes and hashes of {MANIFEST}"


def _compared(directory: Path, entry: Entry) -> Iterator[str]:
    """How a directory differs from an entry's list of files."""
    present = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*"))}
    for path in present.values():
        if path.is_symlink():
            yield f"{path} is a link; an entry holds plain files only"
    for file in entry.files:
        path = present.pop(file.path, directory / file.path)
        if not path.is_file():
            yield f"{file.path} is missing"
        elif (size := path.stat().st_size) != file.size:
            yield f"{file.path} has {size:,} bytes, must have {file.size:,}"
        elif (sha256 := file_sha256(path)) != file.sha256:
            yield f"{file.path} has sha256 {sha256[:12]}…, must be {file.sha256[:12]}…"
    for name, path in present.items():
        if path.is_file() and not any(step.startswith(".") for step in Path(name).parts):
            yield f"{name} is not in the index"


def _headers(check: Check, directory: Path) -> dict[str, dict[str, TensorInfo]]:
    """File -> its tensors."""
    found = {}
    for path in sorted(directory.rglob("*.safetensors")):
        with check.finding():
            found[path.relative_to(directory).as_posix()] = read_header(path)
    tensors = sum(map(len, found.values()))
    check.looked_at = f"{tensors:,} tensors in {len(found)} files, by their headers"
    return found


def _check_shapes(check: Check, directory: Path, found: Mapping[str, dict[str, TensorInfo]]) -> None:
    """Compare headers with modules that are built from the configs, without values."""
    looked_at = []
    for part, build in (("encoder", _encoder), ("connector", _connector), ("projector", _projector)):
        written = found.get(f"{part}/{WEIGHTS_FILE}")
        if written is None:
            continue
        with check.finding():
            with torch.device("meta"):
                expected = build(directory / part).state_dict()
            check_fit(expected, _without_values(written), what=part, where=part)
            kinds = _kinds(expected, written)
            looked_at.append(f"{part} {len(written)} {kinds}")
    check.looked_at = "names, shapes and dtypes: " + (", ".join(looked_at) or "no part has a config of ours")


def _encoder(directory: Path) -> torch.nn.Module:
    written = read_config(directory)
    with _malformed(directory):
        config: EncoderConfig = TypeAdapter(EncoderConfig).validate_python(written["encoder"])
    return encoders.build(config, load_weights=False)


def _connector(directory: Path) -> torch.nn.Module:
    written = read_config(directory)
    with _malformed(directory):
        config: ConnectorConfig = TypeAdapter(ConnectorConfig).validate_python(written["connector"])
        return connectors.build(config, width_in=int(written["width_in"]), patches=int(written["patches"]))


_projector = Projector.described


@contextmanager
def _malformed(directory: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{directory}: its config is malformed: {error}") from error


def _kinds(expected: Mapping[str, Tensor], written: Mapping[str, TensorInfo]) -> str:
    """The dtypes of a part. Raises IntegrityError where numbers and flags are mixed up."""
    odd = [
        f"{name} is {info.dtype}, must be one of {', '.join(_DTYPES)}"
        for name, info in written.items()
        if expected[name].is_floating_point() != (info.dtype in _DTYPES)
    ]
    if odd:
        raise IntegrityError("; ".join(_few(odd)))
    return "+".join(sorted({info.dtype for info in written.values()}))


def _check_entry(check: Check, manifest: Mapping[str, Any], entry: Entry) -> None:
    """What an index says of a checkpoint, against what the checkpoint says of itself."""
    base, parts = entry.base, manifest.get("parts", {})
    encoder, connector, projector = (parts.get(name) or {} for name in ("encoder", "connector", "projector"))
    said = [(f"base.llm.{name}", getattr(base.llm, name), manifest["llm"].get(name)) for name in _OF_LLM]
    if base.encoder is not None:
        said += [(f"base.encoder.{name}", value, encoder.get(name)) for name, value in base.encoder]
    interface = entry.interface
    said += [
        ("interface.visual_tokens", interface.visual_tokens, manifest.get("visual_tokens")),
        ("interface.width", interface.width, connector.get("width")),
        ("interface.projected", interface.projected, projector.get("width_out")),
        ("interface.image_size", interface.image_size, encoder.get("image_size")),
        ("interface.prompt", interface.prompt, (manifest.get("prompt") or {}).get("template")),
    ]
    compared = [(name, index, own) for name, index, own in said if None not in (index, own)]
    check.problems += [
        f"{name} is {index!r} in the index, {own!r} in the manifest" for name, index, own in compared if index != own
    ]
    check.looked_at = f"{len(compared)} figures of base and interface"


def _check_base(
    check: Check, manifest: Mapping[str, Any], entry: Entry | None, against: str, trust_remote_code: bool
) -> None:
    """The cheap things first: an LLM of another shape is told without its weights."""
    expected = _expected(manifest, entry.base if entry else None)
    found = read_embeddings(against, trust_remote_code=trust_remote_code).fingerprint
    check.problems += differences(expected, found)
    if not check.problems and expected.weights_sha256 is not None:
        found = open_llm(against, trust_remote_code=trust_remote_code).fingerprint
        check.problems += differences(expected, found)
    compared = [
        name for name in _OF_LLM if None not in (getattr(expected, name), getattr(found, name)) and name != "revision"
    ]
    check.looked_at = ", ".join(name.removesuffix("_sha256") for name in compared) + " of the LLM"


def _expected(manifest: Mapping[str, Any], base: Base | None) -> Fingerprint:
    """The LLM that a manifest names; of what it doesn't say, what the index says."""
    try:
        expected = Fingerprint(**{
            name: value for name, value in manifest["llm"].items() if name in Fingerprint.__dataclass_fields__
        })  # fmt: skip
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST}: what it says of the LLM is malformed: {error}") from error
    if base is None:
        return expected
    missing = {name: getattr(base.llm, name) for name in _OF_LLM if getattr(expected, name) is None}
    return replace(expected, **missing)


def _check_adapter(
    check: Check, directory: Path, written: Mapping[str, TensorInfo], against: str, trust_remote_code: bool
) -> None:
    """Whether an LLM has the layers that an adapter is for, in its shapes."""
    with check.finding():
        with torch.device("meta"):
            skeleton = open_skeleton(against, trust_remote_code=trust_remote_code)
            expected = adapter_state(fresh_adapter(skeleton, directory / "adapter"))
        check_fit(expected, _without_values(written), what="adapter", where="adapter")
        check.looked_at += f"; {len(written)} tensors of the adapter"


# --- helpers ------------------------------------------------------------------------------------


def _without_values(tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    return {name: torch.empty(info.shape, device="meta") for name, info in tensors.items()}


def _few(items: Iterable[str]) -> list[str]:
    """The first of many, and how many more there are."""
    found = list(items)
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more
