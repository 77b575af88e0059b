"""Which token of one LLM is which token of another: byte-exact pairs, whatever the tokenizers' kinds.

Every vocabulary entry is brought to the bytes it stands for in running text (`Ġthe`, `▁the` and WordPiece's `the` are
all `b" the"`), so that two tokenizers meet where their text meets. Special, added, placeholder and under-trained
entries stay out: their embeddings say nothing about a word.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vpgtrans.errors import TransferError

log = logging.getLogger(__name__)

TokenizerKind = Literal["byte-level", "sentencepiece", "wordpiece"]

MINIMUM_PAIRS = 100
"""Fewer shared tokens than this (single bytes, which every tokenizer has, not counted) are no common language."""

_PLACEHOLDER = re.compile(rb"[<\[]\|?(unused|reserved|extra_id|special_token|pad|dummy)\w*\|?[>\]]", re.IGNORECASE)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Words(Protocol):
    """What pairing needs of `llm.WordEmbeddings`: the table as fed to the blocks, and the tokenizer."""

    matrix: Tensor
    tokenizer: Any


@dataclass(frozen=True)
class TokenPairs:
    """Shared tokens: row `source_ids[i]` of one table and `target_ids[i]` of the other stand for `texts[i]`."""

    source_ids: Tensor
    target_ids: Tensor
    texts: tuple[bytes, ...]
    source_total: int
    """Ordinary, trained tokens of the source: what the pairs are a share of."""
    target_total: int

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def source_coverage(self) -> float:
        """Share of the source's ordinary tokens that the target has too."""
        return len(self) / max(self.source_total, 1)

    @property
    def target_coverage(self) -> float:
        """Share of the target's ordinary tokens that the source has too."""
        return len(self) / max(self.target_total, 1)

    def take(self, index: Tensor) -> "TokenPairs":
        """The pairs at `index` (LongTensor or BoolTensor), coverage still counted from the whole vocabularies."""
        rows = index.nonzero().flatten() if index.dtype == torch.bool else index
        texts = tuple(self.texts[i] for i in rows.tolist())
        return TokenPairs(self.source_ids[rows], self.target_ids[rows], texts, self.source_total, self.target_total)

    def split(self, held_out: float = 0.1, *, seed: int = 0) -> tuple["TokenPairs", "TokenPairs"]:
        """Fit and held-out pairs. Case and space variants of a word fall on the same side, or the test leaks."""
        forms: dict[str, list[int]] = defaultdict(list)
        for i, text in enumerate(self.texts):
            forms[word_form(text)].append(i)
        keys = sorted(forms)
        order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
        mask = torch.zeros(len(self), dtype=torch.bool)
        for k in order[: round(held_out * len(keys))]:
            mask[forms[keys[k]]] = True
        return self.take(~mask), self.take(mask)

    def without(self, words: Iterable[str]) -> "TokenPairs":
        """The pairs whose word form is none of `words`' forms."""
        banned = {word_form(word.encode()) for word in words}
        return self.take(torch.tensor([word_form(text) not in banned for text in self.texts], dtype=torch.bool))


def word_form(text: bytes) -> str:
    """What a token's case and space variants have in common; bytes that aren't UTF-8 stay apart."""
    return text.decode("utf-8", errors="backslashreplace").strip().casefold()


def pair_tokens(source: Words, target: Words, *, minimum: int = MINIMUM_PAIRS) -> TokenPairs:
    """Byte-exact pairs of ordinary, trained tokens, in the order of the target's ids.

    Raises:
        TransferError: fewer than `minimum` tokens of more than one byte are shared.
    """
    source_of = _trained_tokens(source)
    target_of = _trained_tokens(target)
    shared = sorted((target_of[text], source_of[text], text) for text in target_of.keys() & source_of.keys())
    words = sum(len(text) > 1 for _, _, text in shared)
    if words < minimum:
        raise TransferError(
            f"the two LLMs share {words} tokens of more than a byte (of {len(source_of)} in the source's vocabulary "
            f"and {len(target_of)} in the target's); a word converter needs at least {minimum}: take two LLMs whose "
            "tokenizers cover the same language, or initialiser: inherit, which needs none"
        )
    pairs = TokenPairs(
        source_ids=torch.tensor([s for _, s, _ in shared], dtype=torch.long),
        target_ids=torch.tensor([t for t, _, _ in shared], dtype=torch.long),
        texts=tuple(text for _, _, text in shared),
        source_total=len(source_of),
        target_total=len(target_of),
    )
    log.info("%d shared tokens: %.1f %% of the target's", len(pairs), 100 * pairs.target_coverage)
    return pairs


def same_table(a: Words, b: Words, *, tolerance: float = 0.1) -> bool:
    """Did a fine-tune keep the embedding table? Then prompts fit as they are (initialiser `keep`).

    True when widths agree, at least 95 % of each side's ordinary tokens have the same id and bytes on the other, and
    these rows differ by no more than `tolerance` (Frobenius norm, relative): room for quantisation and a short
    fine-tune, far below what two separately trained tables differ by (about 1.4).
    """
    if a.matrix.shape[1] != b.matrix.shape[1]:
        return False
    bytes_a, bytes_b = token_bytes(a.tokenizer), token_bytes(b.tokenizer)
    rows = min(len(a.matrix), len(b.matrix))
    ids = [i for i, text in bytes_a.items() if i < rows and bytes_b.get(i) == text]
    if not ids or len(ids) < 0.95 * max(len(bytes_a), len(bytes_b)):
        return False
    apart, size = 0.0, 0.0
    for part in torch.tensor(ids).split(8192):
        left = a.matrix[part].float()
        apart += (left - b.matrix[part].float()).square().sum(dtype=torch.float64).item()
        size += left.square().sum(dtype=torch.float64).item()
    return apart <= tolerance**2 * size


# --- tokens to bytes ----------------------------------------------------------------------------


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """id -> bytes in running text, for every ordinary token (special, added and placeholder ones are left out)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab() if backend is None else backend.get_vocab(with_added_tokens=False)
    added = {int(i) for i in getattr(tokenizer, "added_tokens_decoder", {})} | set(tokenizer.all_special_ids)
    decode = _DECODERS[tokenizer_kind(tokenizer)]
    result: dict[int, bytes] = {}
    for token, i in vocabulary.items():
        if i in added:
            continue
        text = decode(token)
        if text and not _PLACEHOLDER.fullmatch(text.strip()):
            result[i] = text
    return result


def tokenizer_kind(tokenizer: Any) -> TokenizerKind:
    """How this tokenizer writes bytes as tokens, from its own decoder and model; from its vocabulary without these."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        types = _types(backend.decoder) | _types(backend.pre_tokenizer) | {type(backend.model).__name__}
        if "ByteLevel" in types:
            return "byte-level"
        if "WordPiece" in types:
            return "wordpiece"
        if types & {"Metaspace", "ByteFallback", "Unigram"}:
            return "sentencepiece"
        vocabulary = backend.get_vocab(with_added_tokens=False)
    else:
        vocabulary = tokenizer.get_vocab()
    counts = {
        "byte-level": sum(token.startswith("Ġ") for token in vocabulary),
        "sentencepiece": sum(token.startswith("▁") for token in vocabulary),
        "wordpiece": sum(token.startswith("##") for token in vocabulary),
    }
    kind = max(counts, key=lambda name: counts[name])
    if counts[kind] == 0:
        raise TransferError(
            f"the tokenizer {type(tokenizer).__name__} ({len(vocabulary)} tokens) marks spaces in no known way: "
            "expected byte-level BPE (Ġ), SentencePiece (▁) or WordPiece (##)"
        )
    return kind  # type: ignore[return-value]


def _types(component: Any) -> set[str]:
    """Type names of a tokenizers component and of everything nested in it, from its own serialisation."""
    if component is None:
        return set()
    found: set[str] = set()
    queue: list[Any] = [json.loads(component.__getstate__())]
    while queue:
        item = queue.pop()
        if isinstance(item, dict):
            if isinstance(item.get("type"), str):
                found.add(item["type"])
            queue.extend(item.values())
        elif isinstance(item, list):
            queue.extend(item)
    return found


@cache
def _byte_of_character() -> dict[str, int]:
    """The inverse of byte-level BPE's map: printable Latin-1 stands for itself, the rest is moved to U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(moved)}


def _from_byte_level(token: str) -> bytes | None:
    table = _byte_of_character()
    try:
        return bytes(table[c] for c in token)
    except KeyError:  # not written in the map: an entry that the algorithm can't produce
        return None


def _from_sentencepiece(token: str) -> bytes | None:
    match = _BYTE_TOKEN.fullmatch(token)
    if match:
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode("utf-8", errors="replace")


def _from_wordpiece(token: str) -> bytes | None:
    return token[2:].encode() if token.startswith("##") and len(token) > 2 else b" " + token.encode()


_DECODERS: dict[TokenizerKind, Callable[[str], bytes | None]] = {
    "byte-level": _from_byte_level,
    "sentencepiece": _from_sentencepiece,
    "wordpiece": _from_wordpiece,
}


# --- rows that training never reached -----------------------------------------------------------


def under_trained(matrix: Tensor, ids: Tensor, *, threshold: float = 6.0) -> Tensor:
    """BoolTensor over `ids`: rows of `matrix [V, d]` that training left as they were.

    A row is under-trained when its norm is below 1/1000 of the median, when its log-norm lies more than `threshold`
    robust standard deviations (1.4826 × median absolute deviation) from the median, or when it equals another row.
    """
    norms = torch.cat([matrix[part].float().norm(dim=1) for part in ids.split(8192)])
    median = norms.median()
    near_zero = norms < 1e-3 * median
    logs = norms.clamp_min(1e-30).log()
    centre = logs.median()
    spread = 1.4826 * (logs - centre).abs().median()
    # A table with (almost) equal norms has no outliers to speak of: without a floor rounding errors would become some.
    outlier = (logs - centre).abs() > threshold * spread.clamp_min(0.02)
    # Equal rows are found by some of their columns; 32 equal float columns don't happen to two trained rows.
    columns = torch.linspace(0, matrix.shape[1] - 1, min(32, matrix.shape[1])).long()
    probe = torch.cat([matrix[part][:, columns].float() for part in ids.split(8192)])
    _, group, counts = torch.unique(probe, dim=0, return_inverse=True, return_counts=True)
    return near_zero | outlier | (counts[group] > 1)


def _trained_tokens(words: Words) -> dict[bytes, int]:
    """bytes -> id. Where two tokens stand for the same bytes (`a` and `<0x61>`), the plain one wins."""
    by_id = {i: text for i, text in token_bytes(words.tokenizer).items() if i < len(words.matrix)}
    if not by_id:
        return {}
    ids = torch.tensor(sorted(by_id))
    kept = ids[~under_trained(words.matrix, ids)].tolist()
    tokens: Any = words.tokenizer.convert_ids_to_tokens(kept)
    result: dict[bytes, int] = {}
    for i, token in zip(kept, tokens, strict=True):
        text = by_id[i]
        if text not in result or not _BYTE_TOKEN.fullmatch(token):
            result[text] = i
    return result
