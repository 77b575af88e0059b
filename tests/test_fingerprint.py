"""Adapters and projectors never land on another base without a word, though peft would take it."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from commands import invoke
from PIL import Image
from tiny import tiny_config, tiny_llm
from tiny_runs import build_tiny
from tiny_training import build_vlm, make_recipe

import vpgtrans as vt
from vpgtrans.errors import IntegrityError
from vpgtrans.fingerprint import Fingerprint, check_base, config_sha256, differences, weights_sha256
from vpgtrans.llm import open_llm
from vpgtrans.training.parts import set_trainable
from vpgtrans.vlm_directory import load_vlm, save_vlm

BASE = Fingerprint(
    reference="hf:someone/llm",
    revision="a" * 40,
    architecture="LlamaForCausalLM",
    width=32,
    layers=2,
    vocabulary=512,
    tokenizer_sha256="1" * 64,
    embeddings_sha256="2" * 64,
    config_sha256="3" * 64,
    weights_sha256="4" * 64,
)


@pytest.fixture(scope="module")
def adapted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM directory with an adapter on the LLM at root/llm."""
    vlm = build_vlm(root)
    stage = {"name": "s", "trainable": {"llm": "lora"}, "budget": {"samples": 4}}
    set_trainable(vlm, make_recipe([stage]).stages[0])
    return save_vlm(vlm, tmp_path_factory.mktemp("adapted") / "vlm", lineage={})


def moved(vlm: Path, llm: Path, to: Path) -> Path:
    """A copy of a VLM directory whose manifest names another LLM."""
    copy = Path(shutil.copytree(vlm, to))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["llm"]["reference"] = str(llm)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def deeper(to: Path) -> Path:
    tiny_llm("llama", to)
    config = tiny_config("llama")
    config.num_hidden_layers += 1
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(to)
    return to


def tuned(llm: Path, to: Path) -> Path:
    """As fine-tuned with a very small rate: embeddings and shape are the same, one block's weights hardly differ."""
    shutil.copytree(llm, to)
    model = transformers.AutoModelForCausalLM.from_pretrained(llm)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight += 0.01 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(to)
    return to


WRONG = {
    "same shape": (lambda llm, to: tiny_llm("llama", to, seed=9), ("other word embeddings", "other weights")),
    "fine-tune": (tuned, ("other weights: a fine-tune",)),
    "other depth": (lambda llm, to: deeper(to), ("another number of layers: 3, must be 2", "another shape")),
    "other vocabulary": (
        lambda llm, to: tiny_llm("llama", to, vocabulary=600),
        ("another number of words: 600, must be 512", "another tokenizer"),
    ),
    "other tokenizer": (
        lambda llm, to: tiny_llm("llama", to, sentences=("Ganz andere Wörter stehen hier.",) * 9),
        ("another tokenizer",),
    ),
    "other width": (lambda llm, to: tiny_llm("llama", to, width=48), ("another width: 48, must be 32",)),
    "other family": (lambda llm, to: tiny_llm("qwen2", to), ("another model class: Qwen2ForCausalLM",)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_base_is_refused_and_why_is_said(root: Path, adapted: Path, tmp_path: Path, wrong: str) -> None:
    make, reasons = WRONG[wrong]
    vlm = moved(adapted, make(root / "llm", tmp_path / "llm"), tmp_path / "vlm")
    with pytest.raises(IntegrityError) as caught:
        load_vlm(str(vlm))
    for reason in reasons:
        assert reason in str(caught.value)
    picture = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    result = invoke("caption", vlm, picture, "--device", "cpu")
    assert result.exit_code == 4
    assert reasons[0] in result.stderr
    assert "--force" in result.stderr


def test_peft_takes_each_of_same_shape_without_a_word(root: Path, adapted: Path, tmp_path: Path) -> None:
    """What the check is for: were this to fail, peft had learnt to look itself."""
    for name, make in (("same", lambda: tiny_llm("llama", tmp_path / "same", seed=9)),
                       ("tuned", lambda: tuned(root / "llm", tmp_path / "tuned"))):  # fmt: skip
        base = transformers.AutoModelForCausalLM.from_pretrained(make())
        peft.PeftModel.from_pretrained(base, adapted / "adapter")
        assert (tmp_path / name).is_dir()


def test_force_takes_it_with_a_warning(
    root: Path, adapted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = moved(adapted, tuned(root / "llm", tmp_path / "llm"), tmp_path / "vlm")
    with caplog.at_level(logging.WARNING):
        vt.load(vlm, device="cpu", force=True)
    assert "used on another LLM than it was made with: other weights" in caplog.text
    picture = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    assert invoke("caption", vlm, picture, "--device", "cpu", "--force").exit_code == 0


def test_force_of_a_transfer_is_in_the_lineage(tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "tiny")
    shutil.rmtree(tiny.source_llm)
    tiny_llm("llama", tiny.source_llm, seed=77)
    with pytest.raises(IntegrityError, match="belongs to another LLM"):
        vt.transfer(tiny.transfer_recipe(), output=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    recipe = tiny.transfer_recipe(source={"vpg": str(tiny.source), "force": True})
    run = vt.transfer(recipe, output=tmp_path / "run", device="cpu")
    for file in (run / "lineage.json", run / "vlm" / "manifest.json"):
        written = json.loads(file.read_text())
        (forced,) = written.get("lineage", written)["forced"]
        assert forced.startswith("other word embeddings")


def test_an_older_manifest_is_compared_in_what_it_says(root: Path, adapted: Path, tmp_path: Path) -> None:
    vlm = moved(adapted, tuned(root / "llm", tmp_path / "llm"), tmp_path / "vlm")
    manifest = json.loads((vlm / "manifest.json").read_text())
    del manifest["llm"]["weights_sha256"], manifest["llm"]["config_sha256"]
    (vlm / "manifest.json").write_text(json.dumps(manifest))
    assert load_vlm(str(vlm)).llm.fingerprint.weights_sha256 is not None


# --- the fingerprint itself -----------------------------------------------------------------------


def test_every_weight_counts(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))
    seen = {weights_sha256(model)}
    for _, parameter in model.named_parameters():
        with torch.no_grad():
            parameter[(0,) * parameter.dim()] += 1
        found = weights_sha256(model)
        assert found not in seen
        seen.add(found)


def test_neither_dtype_nor_place_counts(tmp_path: Path) -> None:
    llm = tiny_llm("qwen3", tmp_path / "llm")
    assert open_llm(str(llm)).fingerprint == open_llm(str(llm), dtype=torch.float32).fingerprint
    elsewhere = Path(shutil.copytree(llm, tmp_path / "elsewhere"))
    assert differences(open_llm(str(llm)).fingerprint, open_llm(str(elsewhere)).fingerprint) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_what_a_config_leaves_out_is_as_if_written(family: str) -> None:
    """Versions of the library fill in what others leave None."""
    config = tiny_config(family)
    before = config_sha256(config)
    text = config.get_text_config()
    if getattr(text, "num_key_value_heads", None) == text.num_attention_heads:
        text.num_key_value_heads = None
        assert config_sha256(config) == before
    text.num_hidden_layers += 1
    assert config_sha256(config) != before


def test_the_same_is_the_same() -> None:
    assert differences(BASE, BASE) == []
    assert check_base(BASE, BASE, where="x") == []
    unknown = replace(BASE, embeddings_sha256=None, config_sha256=None, weights_sha256=None, revision=None)
    assert differences(BASE, unknown) == differences(unknown, BASE) == []


@pytest.mark.parametrize("field", ["tokenizer_sha256", "embeddings_sha256", "config_sha256", "weights_sha256"])
def test_each_hash_counts(field: str) -> None:
    (odd,) = differences(BASE, replace(BASE, **{field: "b" * 64}))
    assert odd.endswith(f"({field}): bbbbbbbbbbbb…, must be {getattr(BASE, field)[:12]}…")


@pytest.mark.parametrize(
    ("reference", "compared"),
    [
        ("hf:someone/llm", True),
        ("someone/llm", True),
        (f"hf:someone/llm@{'b' * 40}", True),
        ("pip:llm", False),
        ("hf:another/llm", False),
    ],
)
def test_a_revision_counts_where_the_place_is_the_same(reference: str, compared: bool) -> None:
    found = replace(BASE, reference=reference, revision="b" * 40)
    expected = [f"another revision: {'b' * 40}, must be {'a' * 40}"] if compared else []
    assert differences(BASE, found) == expected
    if compared:
        with pytest.raises(IntegrityError, match="another revision"):
            check_base(BASE, found, where="x")
