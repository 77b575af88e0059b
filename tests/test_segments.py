"""Where samples stand in a batch: every token once, positions from zero, borders, masks; and images seen both ways."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import TEXTS, VISUAL_TOKENS, alone, open_family, random_prompts, ranges, splice_of, trained
from torch import Tensor

from vpgtrans import isolation
from vpgtrans.llm import LanguageModel
from vpgtrans.prompts import VISUAL, Text, Turn
from vpgtrans.segments import ALIKE, Segments
from vpgtrans.vlm import Splice

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@st.composite
def batches(draw) -> Segments:
    """Samples in one row, or in a padded row each, on the right or left; with images in some of them."""
    lengths, layout = draw(LENGTHS), draw(st.sampled_from(["packed", "right", "left"]))
    width = max(lengths) + draw(st.integers(0, 3))
    if layout == "packed":
        starts, shape = [sum(lengths[:sample]) for sample in range(len(lengths))], (1, sum(lengths))
    else:
        shape = (len(lengths), width)
        starts = [row * width + (width - length) * (layout == "left") for row, length in enumerate(lengths)]
    spans = []
    for start, length in zip(starts, lengths, strict=True):
        cuts = sorted(draw(st.sets(st.integers(0, length), max_size=4)))
        spans += [(start + first, start + last) for first, last in zip(cuts[::2], cuts[1::2], strict=False)]
    return Segments(shape, starts, lengths, spans)


def seen_by(segments: Segments, window: int | None) -> Tensor:
    """What sees what among the flattened tokens, written down as one mask of all of them."""
    size = segments.shape[0] * segments.shape[1]
    behind = torch.arange(size)[:, None] - torch.arange(size)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for own in ranges(segments):
        mask[own, own] = ((behind >= 0) & (behind < (window or size)))[own, own]
    for start, stop in segments.spans:
        mask[start:stop, start:stop] = True
    return mask


@settings(deadline=None)
@given(batches())
def test_every_token_of_a_sample_is_in_one_group_once_and_comes_back_to_its_place(segments):
    real = [group.index[group.real] for group in segments.groups]
    inside = torch.cat([torch.arange(own.start, own.stop) for own in ranges(segments)])
    assert torch.equal(torch.cat(real).sort().values, inside.sort().values)
    laid_out = torch.cat([group.index.flatten() for group in segments.groups] + [torch.tensor([-1])])
    expected = torch.full((segments.shape[0] * segments.shape[1],), -1)
    expected[inside] = inside
    assert torch.equal(laid_out[segments.back], expected)
    assert segments.whole == (len(inside) == len(expected))


@settings(deadline=None)
@given(batches())
def test_positions_count_from_the_start_of_each_sample(segments):
    positions = segments.positions.flatten()
    assert segments.positions.shape == segments.shape
    for own in ranges(segments):
        assert positions[own].tolist() == list(range(own.stop - own.start))
    assert int(positions.sum()) == sum(length * (length - 1) // 2 for length in segments.lengths)


@settings(deadline=None)
@given(batches(), st.integers(1, 3))
def test_rows_that_come_several_times(segments, times):
    rows, width = segments.shape
    found = segments.repeated(times)
    assert found.shape == (rows * times, width)
    assert torch.equal(found.positions, segments.positions.repeat_interleave(times, dim=0))
    size = rows * width
    mask = seen_by(segments, None).view(rows, width, size)
    for row, copies in enumerate(seen_by(found, None).view(rows, times, width, rows, times, width)):
        for copy in range(times):
            expected = torch.zeros(width, rows, times, width, dtype=torch.bool)
            expected[:, row, copy] = mask[row].view(width, rows, width)[:, row]
            assert torch.equal(copies[copy], expected)


@settings(deadline=None)
@given(LENGTHS)
def test_borders_of_a_row(lengths):
    segments = Segments.in_a_row(lengths)
    assert segments.whole
    assert segments.shape == (1, sum(lengths))
    assert segments.borders.dtype == torch.int32
    assert segments.borders.diff().tolist() == lengths
    assert segments.borders[0] == 0


@settings(deadline=None)
@given(LENGTHS)
def test_only_samples_of_like_length_are_padded_together(lengths):
    for group in Segments.in_a_row(lengths).groups:
        assert group.real.sum(dim=1).min() >= ALIKE * group.index.shape[1]
        assert group.real.sum(dim=1).max() == group.index.shape[1]


@settings(deadline=None)
@given(batches(), st.one_of(st.none(), st.integers(1, 8)))
def test_groups_mask_what_the_definition_says(segments, window):
    expected = seen_by(segments, window)
    for group in segments.groups:
        mask = group.mask(window)
        length = group.index.shape[1]
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        for row, found in enumerate(mask[:, 0].expand(len(group.index), -1, -1)):
            own = group.index[row][group.real[row]]
            assert torch.equal(found[group.real[row]][:, group.real[row]], expected[own][:, own])
            assert not found[group.real[row]][:, ~group.real[row]].any()  # no token sees padding
            assert found.any(dim=1).all()  # and padding sees something, or it would be nan


@settings(deadline=None)
@given(batches(), st.sampled_from([None, 3]))
def test_attention_of_blocks_is_attention_under_the_whole_mask(segments, window):
    generator = torch.Generator().manual_seed(0)
    size = (segments.shape[0], 2, segments.shape[1], 4)
    query, key, value = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(3))
    found, _ = isolation._blocks(
        torch.nn.Identity(), query, key[:, :1], value[:, :1], None, scaling=0.3, sliding_window=window,
        segments=segments,
    )  # fmt: skip
    flat = [each.transpose(1, 2).flatten(0, 1).transpose(0, 1) for each in (query, key[:, :1], value[:, :1])]
    mask = seen_by(segments, window)
    inside = mask.any(dim=1)
    scores = (0.3 * flat[0] @ flat[1].transpose(1, 2)).masked_fill(~mask, -torch.inf)[:, inside]
    expected = (scores.softmax(dim=-1) @ flat[2]).transpose(0, 1)
    torch.testing.assert_close(found.flatten(0, 1)[inside], expected)
    assert not found.flatten(0, 1)[~inside].any()


# --- images that see both ways -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3, window", "gpt2"])
def llm(request, tmp_path_factory) -> LanguageModel:
    return open_family(request.param, tmp_path_factory.mktemp("llm") / "llm")


def reference_logits(splice: Splice, ids: np.ndarray, prompts: Tensor) -> Tensor:
    """Logits [L, V] of one text, by transformers' eager attention under explicit masks [1, 1, L, L]."""
    model, config = splice.llm.model, splice.llm.model.config
    embeddings = splice._embed(torch.from_numpy(ids)[None], prompts)
    places = (ids == VISUAL).nonzero()[0].reshape(-1, VISUAL_TOKENS)
    spans = [(int(image[0]), int(image[-1]) + 1) for image in places]

    def mask(window: int | None) -> Tensor:
        seen = seen_by(Segments((1, len(ids)), [0], [len(ids)], spans), window)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    masks = mask(None)
    if config.model_type == "gemma3_text":
        masks = {"full_attention": masks, "sliding_attention": mask(config.sliding_window)}
    with isolation.attention(model, "eager"):
        return model(inputs_embeds=embeddings, attention_mask=masks, use_cache=False).logits[0]


def reference_nll(splice: Splice, text: Text, prompts: Tensor) -> Tensor:
    encoded = splice.prompter.encode(text)
    logits = reference_logits(splice, encoded.ids, prompts)
    places = encoded.answer.nonzero()[0]
    return torch.nn.functional.cross_entropy(
        logits[places - 1], torch.from_numpy(encoded.ids[places]), reduction="none"
    )


def prompts_of(splice: Splice) -> list[Tensor]:
    prompts = random_prompts(splice)
    return [prompts[:1], prompts[:0], prompts[1:3], prompts[3:4], prompts[4:]]


@torch.no_grad()
def test_images_see_both_ways_as_an_explicit_mask_says(llm):
    splice, prompts = splice_of(llm, both_ways=True), random_prompts(splice_of(llm))
    expected = [reference_nll(splice, text, own) for text, own in zip(TEXTS, prompts_of(splice), strict=True)]
    for packed in (True, False):
        nll, rows = splice.token_nll(prompts, TEXTS, packed=packed)
        for text, values in enumerate(expected):
            torch.testing.assert_close(nll[rows == text], values, atol=1e-4, rtol=1e-5)
    for found, values in zip(alone(splice, prompts), expected, strict=True):
        torch.testing.assert_close(found, values, atol=1e-4, rtol=1e-5)
    causal = torch.cat(alone(splice_of(llm), prompts))
    assert (causal - torch.cat(expected)).abs().max() > 0.1  # it matters, or all of the above could hold without it


def test_gradients_of_images_that_see_both_ways(tmp_path):
    both = trained(splice_of(open_family("llama", tmp_path / "llm"), both_ways=True))
    packed, padded = both.gradients(packed=True), both.gradients(packed=False)
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())


QUESTIONS: tuple[Text, ...] = (
    (Turn("user", "<image>"), Turn("assistant", "")),
    (Turn("user", "Where is the dog?"), Turn("assistant", "")),
    (Turn("user", "<image><image>\nWhich of the two clocks on the wall is late?"), Turn("assistant", "")),
)


def greedily(splice: Splice, ids: np.ndarray, prompts: Tensor, *, words: int) -> str:
    """The likeliest next words, each by a pass over all that stands before it."""
    length, tokenizer = len(ids), splice.llm.tokenizer
    while len(ids) < length + words:
        word = int(reference_logits(splice, ids, prompts)[-1].argmax())
        if word == tokenizer.eos_token_id:
            break
        ids = np.append(ids, word)
    return tokenizer.decode(ids[length:], skip_special_tokens=True).strip()


@torch.no_grad()
def test_what_is_written_is_what_full_passes_under_the_mask_would_write(llm):
    splice, matters = splice_of(llm, both_ways=True), False
    before = [splice.prompter.question(question) for question in QUESTIONS]
    for seed in range(8):
        prompts = random_prompts(splice, QUESTIONS, seed=seed)
        expected = [
            greedily(splice, ids, own, words=5)
            for ids, own in zip(before, (prompts[:1], prompts[:0], prompts[1:]), strict=True)
        ]
        assert splice.write(prompts, before, max_new_tokens=5) == expected
        matters |= splice_of(llm).write(prompts, before, max_new_tokens=5) != expected
    assert matters
    assert llm.model.config._attn_implementation == "sdpa"


def test_several_beams_of_images_that_see_both_ways(llm):
    splice = splice_of(llm, both_ways=True)
    before, prompts = [splice.prompter.question(question) for question in QUESTIONS], random_prompts(splice, QUESTIONS)
    together = splice.write(prompts, before, max_new_tokens=4, num_beams=3)
    for row, own in enumerate((prompts[:1], prompts[:0], prompts[1:])):
        assert splice.write(own, before[row : row + 1], max_new_tokens=4, num_beams=3) == together[row : row + 1]
    drawn = splice.write(prompts, before, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert len(drawn) == 2 * len(QUESTIONS)
