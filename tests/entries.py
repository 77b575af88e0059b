"""Small checkpoints for tests of the registry: files, and an entry that lists them. Not a test file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpgtrans.registry.entry import Entry, FileEntry


def safetensors(size: int = 1000, *, fill: int = 7) -> bytes:
    """A whole safetensors file with one tensor of bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes((fill + place) % 251 for place in range(size))


FILES: Mapping[str, bytes] = {
    "manifest.json": b'{"format_version": 1}',
    "projector/model.safetensors": safetensors(50_000),
    "projector/a b.txt": b"",
}


def listed(files: Mapping[str, bytes]) -> tuple[FileEntry, ...]:
    return tuple(
        FileEntry(path=path, size=len(content), sha256=hashlib.sha256(content).hexdigest())
        for path, content in files.items()
    )


def write(directory: Path, files: Mapping[str, bytes] = FILES) -> Path:
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


def entry(files: Mapping[str, bytes], locations: Sequence[str], **changes: Any) -> Entry:
    """An entry that is right about its files, but for `changes`."""
    values: dict[str, Any] = {
        "id": "owl",
        "version": "1.0",
        "kind": "vlm",
        "description": "An owl's eyes.",
        "locations": tuple(locations),
        "files": listed(files),
        "base": {"llm": {"reference": "pip:llm", "width": 8, "vocabulary": 10, "tokenizer_sha256": "a" * 64}},
        "interface": {"visual_tokens": 4, "width": 8, "image_size": 32, "prompt": "<image>"},
        "licence": {"spdx": "Apache-2.0"},
    }
    return Entry.model_validate(values | changes)
