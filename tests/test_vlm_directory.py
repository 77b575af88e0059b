"""Saving and loading a VLM: the same logits bit for bit, and an error that names whatever is not right."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_llm
from tiny_training import SIDE, Pictures, build_vlm, make_models, make_recipe

import vpgtrans as vt
from vpgtrans.cli.root import cli
from vpgtrans.errors import CheckpointError, IntegrityError, ReferenceError_
from vpgtrans.llm import open_llm
from vpgtrans.references import file_sha256
from vpgtrans.runs.parts import open_source
from vpgtrans.training.parts import set_trainable
from vpgtrans.vlm import VLM
from vpgtrans.vlm_directory import load_vision, load_vlm, read_manifest, save_vlm

PICTURES = Pictures(3)
LORA = {"name": "s", "trainable": {"llm": "lora"}, "budget": {"samples": 4}}


def adapted(root: Path, *, dtype: torch.dtype = torch.float32) -> VLM:
    """A VLM with a LoRA adapter that does something."""
    vlm = build_vlm(root, dtype=dtype)
    torch.manual_seed(0)
    set_trainable(vlm, make_recipe([LORA]).stages[0])
    with torch.no_grad():
        for name, parameter in vlm.language_model.named_parameters():
            if "lora_B" in name.split("."):
                parameter.normal_(0, 0.3)
    return vlm.eval()


def losses(vlm: VLM) -> torch.Tensor:
    with torch.no_grad():
        prompts = vlm.prompts_from(vlm.visual_tokens([PICTURES.image(row) for row in range(3)]))
        return vlm.splice.token_nll(prompts, PICTURES.captions)[0]


def save(vlm: VLM, directory: Path, **options: bool) -> Path:
    return save_vlm(vlm, directory, lineage={"parent": "none"}, **options)


@pytest.fixture(scope="module")
def saved(root, tmp_path_factory) -> tuple[VLM, Path]:
    vlm = adapted(root)
    return vlm, save(vlm, tmp_path_factory.mktemp("saved") / "vlm")


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[1], tmp_path / "vlm"))


# --- what was saved comes back ------------------------------------------------------------------


def test_the_same_logits_bit_for_bit(saved):
    vlm, directory = saved
    again = load_vlm(str(directory), dtype=torch.float32)
    assert torch.equal(losses(again), losses(vlm))
    images = [PICTURES.image(0)]
    assert again.generate(images, max_new_tokens=5) == vlm.generate(images, max_new_tokens=5)
    assert again.prompt == vlm.prompt
    assert not again.training
    assert not any(module.training for module in again.modules())
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_what_separates_it_from_its_base(root, tmp_path, dtype):
    vlm = adapted(root, dtype=dtype)
    again = load_vlm(str(save(vlm, tmp_path / "vlm")), dtype=dtype)
    assert torch.equal(losses(again), losses(vlm))
    with again.language_model.disable_adapter():
        assert not torch.equal(losses(again), losses(vlm))


def test_peft_alone_loads_the_adapter(root, saved):
    vlm, directory = saved
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "llm", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory / "adapter").eval()
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, vlm.language_model(input_ids=ids).logits)


def test_saving_the_adapter_asks_no_hub(root, tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise AssertionError("the hub was asked")

    for name in ("file_exists", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, fail, raising=False)
    vlm = adapted(root)
    vlm.language_model.peft_config["default"].base_model_name_or_path = "pip:some-llm"
    save(vlm, tmp_path / "vlm")
    assert load_file(tmp_path / "vlm/adapter/adapter_model.safetensors")


def test_an_encoder_is_a_reference_unless_it_was_trained(root, tmp_path, saved):
    vlm, by_reference = saved
    assert sorted(path.name for path in (by_reference / "encoder").iterdir()) == ["config.json"]
    entry = read_manifest(by_reference)["parts"]["encoder"]
    assert (entry["reference"], entry["image_size"], entry["width"]) == (str(root / "encoder"), SIDE, 24)
    assert entry["weights_sha256"] == vlm.vpg.encoder.reference_sha256

    trained = build_vlm(root).eval()
    with torch.no_grad():
        for parameter in trained.vpg.encoder.parameters():
            parameter.add_(0.05)
    carried = save(trained, tmp_path / "vlm", encoder_trained=True)
    assert (carried / "encoder/model.safetensors").exists()
    assert read_manifest(carried)["parts"]["encoder"]["reference"] is None
    assert torch.equal(losses(load_vlm(str(carried), dtype=torch.float32)), losses(trained))


def test_an_llm_that_was_trained_in_full_is_carried(root, tmp_path):
    vlm = adapted(root)
    with torch.no_grad():
        for parameter in vlm.language_model.get_base_model().parameters():
            parameter.mul_(1.1)
    directory = save(vlm, tmp_path / "vlm", llm_trained=True)
    again = load_vlm(str(directory), dtype=torch.float32)
    assert torch.equal(losses(again), losses(vlm))
    words = open_source(str(directory), seed=0).words
    assert words is not None
    assert torch.equal(words().matrix, again.llm.embed(torch.arange(len(words().matrix))))
    assert words().fingerprint.embeddings_sha256 != vlm.llm.fingerprint.embeddings_sha256


def test_load_vision_opens_no_llm(root, saved, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(saved[1], tmp_path / "vlm"))
    monkeypatch.setattr("vpgtrans.vlm_directory.open_llm", lambda *_, **__: pytest.fail("opened the LLM"))
    vision = load_vision(str(directory))
    assert vision.fingerprint == saved[0].llm.fingerprint
    assert vision.prompt == saved[0].prompt
    assert vision.manifest["lineage"] == {"parent": "none"}
    for name, tensor in saved[0].vpg.state_dict().items():
        assert torch.equal(vision.vpg.state_dict()[name], tensor)


def test_saving_again_replaces_the_directory_whole(root, tmp_path):
    directory = save(adapted(root), tmp_path / "vlm")
    save(build_vlm(root), directory)
    assert not (directory / "adapter").exists()
    assert not load_vlm(str(directory)).training
    assert [path.name for path in tmp_path.iterdir()] == ["vlm"]


# --- damage -------------------------------------------------------------------------------------

FILES = [
    "encoder/config.json", "connector/config.json", "connector/model.safetensors", "projector/config.json",
    "projector/model.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_altered_file_is_named(copy, name):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        load_vlm(str(copy))
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_vlm(str(copy))


def test_an_extra_file_is_named(copy):
    (copy / "projector/other.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"projector/other\.bin is not in the manifest"):
        load_vlm(str(copy))


def test_strays_and_an_edited_card_do_no_harm(copy):
    (copy / "README.md").write_text("# Another card\n")
    for name in (".DS_Store", ".gitattributes", "LICENSE", ".cache/huggingface/download/a.lock", "projector/.DS_Store"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"x")
    assert read_manifest(copy)["format_version"] == 1
    (copy / "README.md").unlink()
    read_manifest(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format_version": 1}'])
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_vlm(str(copy))


def test_a_later_format_is_refused(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(CheckpointError, match="format version 2; this vpgtrans reads version 1"):
        load_vlm(str(copy))


def rehash(directory: Path, name: str) -> None:
    """Make the manifest agree with a file that a test changed: the tensors themselves must be checked too."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"][name] = {"size": (directory / name).stat().st_size, "sha256": file_sha256(directory / name)}
    (directory / "manifest.json").write_text(json.dumps(manifest))


TENSORS = {
    "connector/model.safetensors": "queries",
    "projector/model.safetensors": "layers.0.weight",
    "adapter/adapter_model.safetensors": "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight",
}


@pytest.mark.parametrize(("file", "tensor"), TENSORS.items())
@pytest.mark.parametrize("damage", ["missing", "unexpected", "must be"])
def test_a_missing_extra_or_mis_shaped_tensor_is_named(copy, file, tensor, damage):
    state = load_file(copy / file)
    if damage == "missing":
        del state[tensor]
    elif damage == "unexpected":
        tensor = f"{tensor}.more"
        state[tensor] = torch.zeros(2)
    else:
        state[tensor] = torch.cat([state[tensor], state[tensor]], dim=-1)
    save_file(state, copy / file)
    rehash(copy, file)
    with pytest.raises(CheckpointError) as caught:
        load_vlm(str(copy))
    assert tensor in str(caught.value)
    assert damage in str(caught.value)


@pytest.mark.parametrize("part", ["encoder", "connector", "projector"])
def test_a_malformed_config_is_named(copy, part):
    (copy / part / "config.json").write_text(json.dumps({part: {"kind": "other"}}))
    rehash(copy, f"{part}/config.json")
    with pytest.raises(CheckpointError, match="config"):
        load_vlm(str(copy))


def test_an_adapter_for_other_modules_is_refused(copy):
    config = json.loads((copy / "adapter/adapter_config.json").read_text())
    (copy / "adapter/adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    rehash(copy, "adapter/adapter_config.json")
    with pytest.raises(CheckpointError, match="adapter does not fit"):
        load_vlm(str(copy))


# --- a wrong base -------------------------------------------------------------------------------


def point_to(directory: Path, llm: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["llm"]["reference"] = str(llm)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_another_llm_is_refused_with_every_field_that_differs(copy, tmp_path):
    point_to(copy, tiny_llm("qwen2", tmp_path / "llm", width=48))
    with pytest.raises(IntegrityError) as caught:
        load_vlm(str(copy))
    message = str(caught.value)
    assert "another model class: Qwen2ForCausalLM, must be LlamaForCausalLM" in message
    assert "another width: 48, must be 32" in message
    assert "embeddings_sha256" in message
    assert "layers" not in message


def test_the_same_llm_with_other_embeddings_is_refused(copy, tmp_path):
    point_to(copy, tiny_llm("llama", tmp_path / "llm", seed=9))
    with pytest.raises(IntegrityError, match="embeddings_sha256") as caught:
        load_vlm(str(copy))
    assert "width" not in str(caught.value)


def test_the_same_llm_elsewhere_is_taken(root, saved, copy, tmp_path):
    moved = Path(shutil.copytree(root / "llm", tmp_path / "llm"))
    point_to(copy, moved)
    assert torch.equal(losses(load_vlm(str(copy), dtype=torch.float32)), losses(saved[0]))


def test_another_encoder_behind_the_reference_is_refused(tmp_path):
    root = make_models(tmp_path / "models")
    directory = save(build_vlm(root), tmp_path / "vlm")
    weights = root / "encoder/model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"encoder from .* has the hash"):
        load_vlm(str(directory))


def test_what_is_no_vlm_is_refused(root):
    with pytest.raises(ReferenceError_, match=r"no VLM directory.*manifest\.json"):
        load_vlm(str(root / "llm"))


def test_the_llm_is_opened_at_the_commit_that_it_was_trained_with(copy, monkeypatch):
    manifest = json.loads((copy / "manifest.json").read_text())
    local = manifest["llm"]["reference"]
    manifest["llm"] |= {"reference": "hf:org/llm", "revision": "abc123"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    opened = []

    def open_here(reference, **options):
        opened.append(reference)
        return open_llm(local, **options)

    monkeypatch.setattr("vpgtrans.vlm_directory.open_llm", open_here)
    load_vlm(str(copy))
    assert opened == ["hf:org/llm@abc123"]


@pytest.mark.parametrize("fast", [False, True])
def test_an_llm_is_used_in_half_precision_where_that_is_fast(copy, monkeypatch, fast):
    monkeypatch.setattr("vpgtrans.runs.parts.cpu_has_bf16", lambda: fast)
    opened = vt.load(copy, device="cpu")
    assert opened.llm.model.dtype == (torch.bfloat16 if fast else torch.float32)


def test_remote_code_runs_only_where_it_is_asked_for(copy, monkeypatch):
    asked = []

    def open_here(reference, **options):
        asked.append(options["trust_remote_code"])
        return open_llm(reference, **options)

    monkeypatch.setattr("vpgtrans.vlm_directory.open_llm", open_here)
    image = copy.parent / "red.png"
    Image.new("RGB", (8, 8), "red").save(image)
    for flag in ([], ["--trust-remote-code"]):
        done = CliRunner().invoke(cli, ["caption", str(copy), str(image), "--max-new-tokens", "1", *flag])
        assert done.exit_code == 0, done.output
    assert asked == [False, True]
