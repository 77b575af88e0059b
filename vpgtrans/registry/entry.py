"""What a registry says of a checkpoint: the types of an entry, and the JSON schema that is made from them.

Reading an index into these types parses text and nothing else: no file that an entry names is opened. The schema's file
is made by `python -m vpgtrans.registry.entry > checkpoints_registry.schema.json`.
"""

import json
import re
import unicodedata
from collections import Counter
from typing import Annotated, Literal, NamedTuple
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FORMAT_VERSION = 2
Kind = Literal["vpg", "projector", "adapter", "vlm"]
KINDS: tuple[Kind, ...] = ("vpg", "projector", "adapter", "vlm")

SCHEMES = ("hf", "oci", "file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "memory")
"""What a location may begin with; fsspec opens all but the first two. A path without one is relative to the index."""
SAFE_SUFFIXES = frozenset(
    {".safetensors", ".json", ".md", ".txt", ".yaml", ".jinja", ".model", ".png", ".jpg", ".webp"}
)
"""What an entry's files may be: weights are safetensors; the rest is text, a tokenizer's model, or a picture."""


class _Form(NamedTuple):
    pattern: re.Pattern[str]
    shown: str


_FORMS = {
    "hf": _Form(re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w./-]*)?", re.ASCII), "hf:ORG/REPO[@REVISION]"),
    "oci": _Form(
        re.compile(
            r"[a-zA-Z0-9][\w.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?",
            re.ASCII,
        ),
        "oci:HOST[:PORT]/REPO[:TAG][@DIGEST]",
    ),
}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(max_length=20_000)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def safe_path(path: str) -> str:
    """A relative path with forward slashes that stays where it begins, on every system. Raises ValueError."""
    parts = path.split("/")
    odd = {"", ".", ".."} & set(parts) or any(part != part.strip() or part.endswith(".") for part in parts)
    # a colon is a drive or a hidden stream on Windows
    if odd or not path.isprintable() or set(path) & set("\\:"):
        raise ValueError(f"{path[:200]!r} must be a relative path with forward slashes, without '.', '..' and ':'")
    if len(path) > 1024 or any(len(part.encode()) > 255 for part in parts):
        raise ValueError(f"{path[:200]!r}… is too long for a file system")
    return path


def safe_location(location: str) -> str:
    """A relative path, hf:ORG/REPO[@REVISION], oci:HOST/REPO[:TAG|@DIGEST], or a URL of one of `SCHEMES`.

    Raises ValueError, whose message holds no part of a URL that may be secret.
    """
    scheme, colon, rest = location.partition(":")
    if not colon or scheme not in SCHEMES:
        return safe_path(location)
    if len(location) > 2048 or not location.isprintable() or " " in location:
        raise ValueError(f"a location that begins with {scheme}: is longer than 2048, or holds blanks")
    if {".", ".."} & set(re.split("[/?#@]", unquote(rest))):
        raise ValueError(f"a location that begins with {scheme}: must not hold '.' and '..'")
    if form := _FORMS.get(scheme):
        if not form.pattern.fullmatch(rest):
            raise ValueError(f"a location that begins with {scheme}: has the form {form.shown}")
        return location
    # urlsplit would drop a backslash's meaning that others give it
    if not rest.startswith("//") or not rest.strip("/") or "\\" in rest:
        raise ValueError(f"a location that begins with {scheme}: has the form {scheme}://…/…")
    if "@" in rest[2:].partition("/")[0]:
        raise ValueError(f"a location {scheme}://… carries credentials; they come from the environment")
    return location


class FileEntry(_Part):
    """One file of an entry."""

    path: str
    """Relative to the entry's directory."""
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _is_safe(cls, path: str) -> str:
        safe_path(path)
        name = path.rpartition("/")[2]
        if "." in name and not any(name.endswith(suffix) for suffix in SAFE_SUFFIXES):
            allowed = ", ".join(sorted(SAFE_SUFFIXES))
            raise ValueError(f"{path!r}: weights are .safetensors, other files one of {allowed}")
        return path


class LLMBase(_Part):
    """The language model that a projector or adapter needs; what is None was not recorded and is not compared."""

    reference: str
    revision: str | None = None
    architecture: str | None = None
    """The model class."""
    width: Count
    layers: Count | None = None
    vocabulary: Count
    """Rows of the embedding table."""
    config_sha256: Sha256 | None = None
    """Of what the config says of the model's shape."""
    tokenizer_sha256: Sha256
    embeddings_sha256: Sha256 | None = None
    weights_sha256: Sha256 | None = None
    """Of some values of every weight, which a fine-tune of the same shape changes."""


class EncoderBase(_Part):
    """The vision encoder before the connector."""

    kind: str
    reference: str | None = None
    """None: its weights are among the files."""
    weights_sha256: Sha256 | None = None
    width: Count
    patches: Count


class Base(_Part):
    """What a checkpoint stands on."""

    llm: LLMBase
    encoder: EncoderBase | None = None


class Interface(_Part):
    """What a user of the checkpoint meets."""

    visual_tokens: Count
    width: Count
    """Of a visual token, before the projector."""
    projected: Count | None = None
    """Of a visual prompt, in the LLM's embedding space."""
    image_size: Count
    prompt: Text


class BaseLicence(_Part):
    """What a base adds to the licence of what is built on it."""

    of: str
    licence: str


class Licence(_Part):
    """Under which terms the files may be used."""

    spdx: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+-]+( (AND|OR|WITH) [A-Za-z0-9.+-]+)*$")]
    """An SPDX expression, such as Apache-2.0 or `CC-BY-SA-4.0 AND MIT`; LicenseRef-… for others."""
    bases: tuple[BaseLicence, ...] = ()


class DataUse(_Part):
    """Data that it was trained on."""

    name: str
    licence: str | None = None
    """None: unknown, and said so."""
    split: str | None = None


class Metric(_Part):
    """One figure."""

    name: str
    value: float
    data: str
    split: str | None = None
    count: Count | None = None
    """Samples."""
    interval: tuple[float, float] | None = None
    """95 %, by bootstrap over the samples."""


class Parent(_Part):
    """Something that it was made from."""

    relation: Literal["source", "target", "base", "parent"]
    """source: the VPG that was moved. target: the LLM it was moved to. base: what training went on
    from. parent: an older version of the same."""
    reference: str
    sha256: Sha256 | None = None
    """Of its manifest, where it has one."""


class Lineage(_Part):
    """Where it comes from."""

    parents: tuple[Parent, ...] = ()
    recipe: str | None = None
    recipe_sha256: Sha256 | None = None
    initialiser: str | None = None
    seed: int | None = None
    code_version: str | None = None
    """Of vpgtrans."""
    forced: tuple[str, ...] = ()
    """Checks that failed and that somebody set aside with --force."""


class Entry(_Part):
    """One version of one checkpoint. What an id and a version name never changes, but its status."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(?:[._-][a-z0-9]+)*$", max_length=96)]
    version: Annotated[str, Field(pattern=r"^(0|[1-9]\d{0,8})(\.(0|[1-9]\d{0,8})){0,3}$")]
    kind: Kind
    description: Text
    locations: Annotated[tuple[str, ...], Field(min_length=1, max_length=32)]
    """A path relative to the index, hf:ORG/REPO[@REVISION], oci:HOST/REPO[:TAG|@DIGEST], or a URL. Tried in order."""
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=10_000)]
    base: Base
    interface: Interface
    licence: Licence
    data: tuple[DataUse, ...] = ()
    metrics: tuple[Metric, ...] = ()
    lineage: Lineage = Lineage()
    status: Literal["active", "yanked"] = "active"
    reason: Text | None = None
    """Why it was yanked."""

    @property
    def name(self) -> str:
        return f"{self.id}@{self.version}"

    @property
    def order(self) -> tuple[int, ...]:
        """Newer versions of an id are larger; 1.0 and 1 are the same."""
        numbers = [int(number) for number in self.version.split(".")]
        while len(numbers) > 1 and numbers[-1] == 0:
            numbers.pop()
        return tuple(numbers)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @field_validator("locations")
    @classmethod
    def _locations_are_safe(cls, locations: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(safe_location(location) for location in locations)

    @model_validator(mode="after")
    def _fits_together(self) -> "Entry":
        # A file system that is blind to case or to ways of writing an accent must not write one file over another.
        paths = [unicodedata.normalize("NFC", file.path).casefold() for file in self.files]
        repeated = sorted(path for path, count in Counter(paths).items() if count > 1)
        if repeated:
            raise ValueError(f"files: listed twice: {', '.join(repeated)}")
        directories = {path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)}
        if both := sorted(directories & set(paths)):
            raise ValueError(f"files: a file and a directory at once: {', '.join(both)}")
        if (self.status == "yanked") != (self.reason is not None):
            raise ValueError("a yanked entry has a reason, and an active one has none")
        return self


class Index(_Part):
    """A registry file."""

    format_version: Literal[2]
    entries: tuple[Entry, ...] | None = ()
    """None where `entries:` stands alone."""


def entry_keys() -> list[str]:
    """Every key that may stand somewhere in a registry file."""
    schema = Index.model_json_schema()
    return sorted({key for each in (schema, *schema["$defs"].values()) for key in each.get("properties", {})})


def json_schema() -> str:
    """The schema of a registry file, for editors and other people's tools."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Index.model_json_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False)


if __name__ == "__main__":
    print(json_schema())
