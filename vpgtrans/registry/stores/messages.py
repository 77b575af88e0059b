"""What a store says of places and failures, without what may be a secret: libraries put URLs into their errors."""

import os
import re
from urllib.parse import urlsplit

_SECRET_VARIABLES = re.compile(r"(?i)token|secret|password|credential|api_?key|access_key|sas")
_SECRETS = (
    (re.compile(r"(?i)(?<=://)[^/\s'\"]*@"), ""),
    (re.compile(r"\?[^\s'\")>]*=[^\s'\")>]*"), "?…"),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]+"), r"\1 …"),
    (re.compile(r"(?i)\b([\w-]*(?:token|secret|password|signature|authorization)[\w-]*['\"]?\s*[:=]\s*)\S+"), r"\1…"),
    (re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|AKIA|ASIA)\w{8,}"), "…"),
)
_LONGEST = 300


def shown(url: str) -> str:
    """A URL without user, password and query. A path stays as it is."""
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return scrubbed(url)
    query = "?…" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def reason(error: BaseException) -> str:
    """The first line of an error's deepest cause."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    if isinstance(error, OSError) and error.strerror:
        return scrubbed(error.strerror)
    lines = str(error).strip().splitlines()
    return scrubbed(lines[0]) if lines else type(error).__name__


def scrubbed(text: str) -> str:
    """A library's words without what looks like a secret, or is one in this process's environment."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_VARIABLES.search(name):
            text = text.replace(value, "…")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return printable if len(printable) <= _LONGEST else printable[:_LONGEST] + " …"
