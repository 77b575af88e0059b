"""What makes two LLMs the same base: peft loads an adapter on any model of the same shape without a word, we don't."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vpgtrans.errors import IntegrityError
from vpgtrans.parts import tensor_bytes

log = logging.getLogger(__name__)

_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "word_embed_proj_dim",
    "ffn_dim",
    "moe_intermediate_size",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
)
"""Attributes of a config, by which `transformers` has the same numbers whatever a family's file calls them."""

_PROBES = 64
"""Values of a weight that count. A fine-tune changes most of all."""


@dataclass(frozen=True)
class Fingerprint:
    """An LLM without its weights; plain JSON values. What is None was not recorded, or can't be told."""

    reference: str
    revision: str | None
    architecture: str
    """The model class, e.g. LlamaForCausalLM."""
    width: int
    layers: int
    vocabulary: int
    """Rows of the embedding table."""
    tokenizer_sha256: str
    embeddings_sha256: str | None
    """Of the table as bf16 bytes, so that the dtype it was opened in doesn't matter."""
    config_sha256: str | None = None
    """Of the config's numbers that give the model's shape."""
    weights_sha256: str | None = None
    """Of some values of every weight; None where they are quantised, or were not opened."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Fingerprint":
        return cls(**values)


# --- hashes -----------------------------------------------------------------------------------


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what a tokenizer does: its backend's serialisation without the padding and truncation of the moment."""
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for passing in ("padding", "truncation"):
            state.pop(passing, None)
        merges = state["model"].get("merges")
        if merges:
            # the library has written both "a b" and ["a", "b"]
            state["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def embeddings_sha256(weight: Tensor) -> str:
    """A hash of an embedding table [V, d] as contiguous bf16 bytes."""
    digest = hashlib.sha256()
    for rows in weight.detach().split(16384):
        digest.update(tensor_bytes(rows.to("cpu", torch.bfloat16)))
    return digest.hexdigest()


def config_sha256(config: Any) -> str:
    """A hash of what a config says of the model's shape."""
    text = config.get_text_config()
    said = {name: getattr(text, name) for name in _SHAPE if getattr(text, name, None) is not None}
    # what a file leaves out, some versions of the library fill in
    if heads := said.get("num_attention_heads"):
        said.setdefault("num_key_value_heads", heads)
        said.setdefault("head_dim", text.hidden_size // heads)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def weights_sha256(model: Any) -> str:
    """A hash of name, shape and some values of every parameter, as bf16, so that no dtype it is opened in matters.

    Values are taken evenly from the first to the last: every parameter is touched, and hardly any of it read.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        flat = weight.detach().reshape(-1)
        if len(flat):
            count = min(_PROBES, len(flat))
            places = [place * (len(flat) - 1) // max(count - 1, 1) for place in range(count)]
            probes = flat[torch.tensor(places, device=flat.device)]
            digest.update(tensor_bytes(probes.to("cpu", torch.bfloat16)))
    return digest.hexdigest()


# --- comparing --------------------------------------------------------------------------------

_SAID = {
    "architecture": "another model class",
    "width": "another width",
    "layers": "another number of layers",
    "vocabulary": "another number of words",
    "config_sha256": "another shape (config_sha256)",
    "tokenizer_sha256": "another tokenizer (tokenizer_sha256)",
    "embeddings_sha256": "other word embeddings (embeddings_sha256)",
    "weights_sha256": "other weights: a fine-tune, another revision or damage (weights_sha256)",
}
"""Field -> what it means that two differ in it."""


def differences(expected: Fingerprint, found: Fingerprint) -> list[str]:
    """What an LLM has otherwise than the one that is expected; what either doesn't say is not compared."""
    odd = []
    if _place(expected.reference) == _place(found.reference) and None not in (expected.revision, found.revision):
        # of two places they say nothing: a commit here, a version there
        odd += [] if expected.revision == found.revision else [_odd("another revision", found, expected, "revision")]
    for field, what in _SAID.items():
        values = getattr(expected, field), getattr(found, field)
        if None not in values and values[0] != values[1]:
            odd.append(_odd(what, found, expected, field))
    return odd


def _odd(what: str, found: Fingerprint, expected: Fingerprint, field: str) -> str:
    return f"{what}: {_short(getattr(found, field))}, must be {_short(getattr(expected, field))}"


def _short(value: Any) -> str:
    """Twelve digits of a hash tell two apart."""
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def _place(reference: str) -> str:
    """A hub repository by one name, with or without scheme and revision; every other reference as it is."""
    scheme, colon, rest = reference.partition(":")
    if colon and scheme != "hf":
        return reference
    return (rest if colon else reference).partition("@")[0]


def check_base(expected: Fingerprint, found: Fingerprint, *, where: str, force: bool = False) -> list[str]:
    """Refuse an LLM that is not the one a projector and adapter were trained with.

    Returns:
        what differs, which force lets pass.

    Raises:
        IntegrityError: naming all that differs.
    """
    odd = differences(expected, found)
    if odd and not force:
        raise IntegrityError(
            f"{where} belongs to another LLM than {found.reference}: {'; '.join(odd)}. "
            "Name the LLM that it was made with; --force (source.force: true in a recipe) takes this one all the same"
        )
    if odd:
        log.warning("%s is used on another LLM than it was made with: %s", where, "; ".join(odd))
    return odd
