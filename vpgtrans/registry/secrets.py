"""A last look at the texts that are about to be published: no token may be in them, wherever it came from."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from vpgtrans.errors import RegistryError

_VARIABLES = re.compile(
    r"(?i)token|secret|password|passwd|credential|api_?key|access_key|account_key|connection_string"
)
_PATTERNS = {
    "a token of the Hugging Face hub": re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,})"),
    "a token of GitLab": re.compile(r"\bglpat-[\w-]{16,}"),
    "a key of AWS": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a key of an API": re.compile(r"\b(?:sk|xox[abprs])-[\w-]{16,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a URL with a password": re.compile(r"\b[a-z][a-z0-9+.-]*://[^/\s\"'`]*:[^/\s\"'`]*@"),
    "a signed URL": re.compile(
        r"(?i)[?&](?:x-amz-signature|x-goog-signature|signature|sig|token|access_token|api_?key)=\w"
    ),
}
_TEXTS = (".md", ".json", ".yaml", ".txt")
_LARGEST = 4 << 20
"""Bytes of a text that is looked at: a larger one is a tokenizer's."""


def check_texts(directory: Path, files: Iterable[str]) -> None:
    """Refuse to publish files of which one holds what looks like a token, or is one in this process's environment.

    Raises:
        RegistryError: naming the file and the kind, never the token.
    """
    for name in files:
        file = directory / name
        if file.suffix in _TEXTS and file.stat().st_size <= _LARGEST:
            check_text(file.read_text(encoding="utf-8", errors="replace"), where=name)


def check_text(text: str, *, where: str) -> None:
    """As `check_texts`, of one text."""
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _secret(line):
            raise RegistryError(
                f"{where}, line {number}, holds {found}: nothing is published. Take it out of the recipe or text that "
                "it comes from (tokens belong into the environment), and revoke it if others may have seen it"
            )


def _secret(line: str) -> str | None:
    for what, pattern in _PATTERNS.items():
        if pattern.search(line):
            return f"what looks like {what}"
    for name, value in os.environ.items():
        if len(value) >= 8 and _VARIABLES.search(name) and value in line:
            return f"the value of ${name}"
    return None
