"""Importing BLIP-2 and LLaVA-1.5: from a directory, the visual prompts of the stock `transformers` classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_vlms import SIDE, VISION, tiny_blip2, tiny_llava

from vpgtrans.errors import CheckpointError, ReferenceError_, TransferError
from vpgtrans.vision import encoders
from vpgtrans.vision.importers import ImportedSource, import_source

SIGLIP = transformers.SiglipVisionConfig(**VISION)


def stock_prompts(directory: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Visual prompts [B, T, d_llm] of the class that transformers itself opens."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        prompts = model.get_image_features(pixels).pooler_output
    return prompts if isinstance(prompts, torch.Tensor) else torch.stack(list(prompts))


def our_prompts(source: ImportedSource, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return source.projector(source.vpg(pixels))


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


CHECKPOINTS = {
    "blip2-opt": lambda path: tiny_blip2(path),
    "blip2-llama": lambda path: tiny_blip2(path, llm="llama", queries=7, seed=3),
    "blip2-sharded": lambda path: tiny_blip2(path, max_shard_size="20KB"),
    "llava-llama": lambda path: tiny_llava(path),
    "llava-qwen2-full": lambda path: tiny_llava(path, llm="qwen2", layer=-1, strategy="full"),
    "llava-siglip-no-bias": lambda path: tiny_llava(path, vision=SIGLIP, strategy="full", bias=False),
    "llava-siglip-last-layer": lambda path: tiny_llava(path, vision=SIGLIP, layer=-1, strategy="full"),
    "llava-sharded": lambda path: tiny_llava(path, max_shard_size="20KB"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_visual_prompts_equal_those_of_the_stock_class(tmp_path, name):
    directory = CHECKPOINTS[name](tmp_path / "source")
    assert len(list(directory.glob("model-*.safetensors"))) > 1 or not name.endswith("sharded")
    source = import_source(directory)
    expected, ours = stock_prompts(directory, pixels()), our_prompts(source, pixels())
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert ours.shape[1] == source.vpg.tokens
    assert not source.vpg.training
    assert not any(parameter.requires_grad for parameter in source.vpg.encoder.parameters())
    assert source.source_llm == str(directory)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_come_as_float32(tmp_path, dtype):
    directory = tiny_llava(tmp_path)
    state = load_file(directory / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in state.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    ours = our_prompts(import_source(directory), pixels())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, stock_prompts(directory, pixels()), rtol=1e-5, atol=1e-5)


def relaid(directory: Path, rename: dict[str, str], *, extra: dict[str, torch.Tensor] | None = None) -> None:
    """Rewrite the weights with other prefixes, as another version of transformers lays them out."""
    state = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        for old, new in rename.items():
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        state[name] = tensor
    save_file(state | (extra or {}), directory / "model.safetensors", metadata={"format": "pt"})


HUB_4 = {"vision_tower.": "vision_tower.vision_model."}
SAVED_BY_4_52 = {
    "vision_tower.": "model.vision_tower.vision_model.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head": "lm_head",
}
IN_MEMORY_5 = SAVED_BY_4_52 | {"vision_tower.": "model.vision_tower."}


@pytest.mark.parametrize("rename", [HUB_4, SAVED_BY_4_52, IN_MEMORY_5])
def test_every_layout_of_llava_on_disk_gives_the_same_prompts(tmp_path, rename):
    directory = tiny_llava(tmp_path)
    expected = our_prompts(import_source(directory), pixels())
    level = next(iter(rename.values()))
    relaid(directory, rename, extra={f"{level}embeddings.position_ids": torch.arange(5)[None]})
    assert torch.equal(our_prompts(import_source(directory), pixels()), expected)


def test_a_pickled_checkpoint_is_read_as_plain_tensors(tmp_path):
    directory = tiny_blip2(tmp_path)
    expected = our_prompts(import_source(directory), pixels())
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert torch.equal(our_prompts(import_source(directory), pixels()), expected)


@pytest.mark.parametrize("make", [tiny_blip2, tiny_llava])
def test_the_language_model_is_never_read(tmp_path, make):
    directory = make(tmp_path, max_shard_size="4KB")
    expected = our_prompts(import_source(directory), pixels())
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    holds_vision = {file for name, file in weight_map.items() if not name.startswith("language_model.")}
    others = set(weight_map.values()) - holds_vision
    assert others
    for file in others:
        (directory / file).unlink()
    assert torch.equal(our_prompts(import_source(directory), pixels()), expected)


def test_the_imported_encoder_rebuilds_from_its_reference_and_from_its_architecture(tmp_path):
    for make in (tiny_blip2, tiny_llava):
        directory = make(tmp_path / make.__name__)
        encoder = import_source(directory).vpg.encoder
        again = encoders.build(type(encoder.config).model_validate_json(encoder.config.model_dump_json()))
        assert again.weights_sha256() == encoder.weights_sha256() == encoder.reference_sha256 == again.reference_sha256
        assert torch.equal(again(pixels()), encoder(pixels()))
        shutil.rmtree(directory)
        bare = encoders.build(encoder.config, load_weights=False)
        assert bare.weights_sha256() != encoder.weights_sha256()
        bare.load_state_dict(encoder.state_dict())
        assert torch.equal(bare(pixels()), encoder(pixels()))


def test_prompt_and_preprocessing_come_from_the_files(tmp_path):
    llava = import_source(tiny_llava(tmp_path / "llava"), reference="hf:someone/some-llava")
    assert llava.prompt.template == "USER: <image>\nASSISTANT:"
    assert llava.source_llm == llava.vpg.encoder.config.reference == "hf:someone/some-llava"
    assert (llava.vpg.transform.config.size, llava.vpg.transform.config.fit) == (SIDE, "crop")
    other = "{% for m in messages %}[INST]{% for c in m['content'] %}<image> {% endfor %}[/INST]{% endfor %}"
    renamed = import_source(tiny_llava(tmp_path / "other", chat_template=other))
    assert renamed.prompt.template == "[INST]<image> [/INST]"
    none = import_source(tiny_llava(tmp_path / "none", chat_template=None))
    assert none.prompt.template.count("<image>") == 1

    directory = tiny_blip2(tmp_path / "blip2")
    blip2 = import_source(directory)
    assert blip2.prompt.template == "<image>"
    assert blip2.vpg.transform.config.fit == "squash"
    (directory / "preprocessor_config.json").unlink()
    assert import_source(directory).vpg.transform.config.size == SIDE


def test_a_template_that_places_two_images_is_not_taken(tmp_path, caplog):
    source = import_source(tiny_llava(tmp_path, chat_template="<image><image>{{ messages | length }}"))
    assert source.prompt.template.count("<image>") == 1
    assert "2 images" in caplog.text


def damaged(directory: Path, change) -> Path:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny_blip2, "qformer.layernorm.weight"),
        (tiny_blip2, "query_tokens"),
        (tiny_blip2, "vision_model.post_layernorm.bias"),
        (tiny_blip2, "language_projection.bias"),
        (tiny_llava, "multi_modal_projector.linear_2.weight"),
        (tiny_llava, "vision_tower.pre_layrnorm.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, make, name):
    directory = damaged(make(tmp_path), lambda state: state.pop(name))
    last = "layers.1.weight" if "linear_2" in name else name.split(".", 1)[-1]
    with pytest.raises(CheckpointError, match=rf"{last}|layers\.0\.{last}"):
        import_source(directory)


def test_extra_and_misshaped_tensors_are_named(tmp_path):
    def add(state):
        state["qformer.encoder.layer.9.odd"] = torch.zeros(2)

    with pytest.raises(CheckpointError, match=r"layer\.9\.odd"):
        import_source(damaged(tiny_blip2(tmp_path / "extra"), add))

    def cut(state):
        state["multi_modal_projector.linear_1.bias"] = torch.zeros(31)

    with pytest.raises(CheckpointError, match=r"layers\.0\.bias is \[31\], must be \[32\]"):
        import_source(damaged(tiny_llava(tmp_path / "cut"), cut))


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ReferenceError_, match=r"config\.json"):
        import_source(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ReferenceError_, match="'llama'; known: blip-2, llava"):
        import_source(tmp_path)
    directory = tiny_llava(tmp_path / "siglip", vision=SIGLIP, strategy="default")
    with pytest.raises(TransferError, match="0 tokens before the patches"):
        import_source(directory)
    (directory / "model.safetensors").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(ReferenceError_, match="no weights"):
        import_source(directory)
    (directory / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [-2, -3]}))
    with pytest.raises(TransferError, match="several layers"):
        import_source(directory)
