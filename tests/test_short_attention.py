"""Attention of short samples in half precision on a CPU: values, gradients, windows, shared heads."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import TEXTS, neighbour_effect, random_prompts, splice_of
from tiny import sharp_llm
from torch import Tensor

from vpgtrans import short_attention as module
from vpgtrans.llm import open_llm
from vpgtrans.short_attention import LONGEST, is_short, short_attention


def tensors(samples: int, length: int, *, heads: int = 4, shared: int = 2, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    sizes = [(samples, heads, length, 3), (samples, heads // shared, length, 3), (samples, heads // shared, length, 5)]
    return [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.sampled_from([1, 2, 4]), st.one_of(st.none(), st.integers(1, 14)))
def test_values_are_those_of_the_definition(samples, length, shared, window):
    query, key, value = tensors(samples, length, shared=shared)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = (behind >= 0) & (behind < (window or length))
    more = [each.repeat_interleave(shared, dim=1) for each in (key, value)]
    expected = F.scaled_dot_product_attention(query, *more, attn_mask=seen, scale=0.7)
    torch.testing.assert_close(short_attention(query, key, value, scale=0.7, window=window), expected)


@pytest.mark.parametrize("together", [1, 40, 1 << 18])
@pytest.mark.parametrize("window", [None, 2])
def test_gradients_are_those_of_the_values(monkeypatch, together, window):
    monkeypatch.setattr(module, "TOGETHER", together)
    inputs = [each.requires_grad_() for each in tensors(2, 4)]
    assert torch.autograd.gradcheck(lambda q, k, v: short_attention(q, k, v, scale=0.7, window=window), inputs)


def test_it_trains_after_it_was_used_without_gradients():
    module._hidden.cache_clear()
    inputs = tensors(1, 6, dtype=torch.bfloat16)
    with torch.inference_mode():
        before = short_attention(*inputs, scale=0.7)
    after = short_attention(*(each.requires_grad_() for each in inputs), scale=0.7)
    after.sum().backward()
    assert torch.equal(before, after)


def test_where_it_is_taken():
    assert is_short(torch.empty(1, 1, LONGEST, 4, dtype=torch.bfloat16))
    assert not is_short(torch.empty(1, 1, LONGEST + 1, 4, dtype=torch.bfloat16))
    assert not is_short(torch.empty(1, 1, 4, 4))


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": 6})])
def test_packs_in_half_precision(tmp_path, monkeypatch, family, changes):
    path = str(sharp_llm(family, tmp_path / "llm", **changes))
    exact, splice = splice_of(open_llm(path, dtype=torch.float32)), splice_of(open_llm(path, dtype=torch.bfloat16))
    prompts = random_prompts(exact)
    expected, _ = exact.token_nll(prompts, TEXTS)
    chosen = splice.isolate("blocks")
    errors = []
    for way in (is_short, lambda query: False):  # against torch's own attention of the same groups
        monkeypatch.setattr("vpgtrans.isolation.is_short", way)
        errors.append((splice.token_nll(prompts, TEXTS, packed=True)[0] - expected).abs().mean())
        assert neighbour_effect(splice, chosen, prompts) == 0
    assert errors[0] < 1.5 * errors[1]
