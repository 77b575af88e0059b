"""FLOPs by shapes against torch's own count of the operations of a real update."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter
from tiny import tiny_llm
from tiny_training import SIDE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpgtrans import gpus
from vpgtrans.config import ConnectorConfig, HuggingFaceEncoderConfig, ImageConfig, ProjectorConfig, PromptConfig
from vpgtrans.errors import UserError
from vpgtrans.flops import StageFlops, update_flops
from vpgtrans.llm import open_llm
from vpgtrans.projector import Projector
from vpgtrans.training.config import Stage
from vpgtrans.training.parts import set_trainable
from vpgtrans.vision import connectors, encoders
from vpgtrans.vision.vpg import VPG
from vpgtrans.vlm import VLM

QFORMER = {"kind": "qformer", "queries": 3, "width": 16, "layers": 2, "heads": 2, "hidden": 32, "dropout": 0.0}
CAPTION = "a red flag of Japan with a white sun, two clocks and a helmet on the wall"


def build(
    root: Path, family: str = "llama", connector: dict[str, Any] = QFORMER, projector: ProjectorConfig | None = None
) -> VLM:
    config = transformers.ViTConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=7,
    )  # fmt: skip
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(root / "encoder")
    seen = HuggingFaceEncoderConfig(reference=str(root / "encoder"), select="patch", image=ImageConfig(size=SIDE))
    encoder = encoders.build(seen)
    stated = TypeAdapter(ConnectorConfig).validate_python(connector)
    made = connectors.build(stated, width_in=encoder.width, patches=encoder.patches)
    llm = open_llm(str(tiny_llm(family, root / family)), dtype=torch.float32)
    joined = Projector(projector or ProjectorConfig(), made.width, llm.width, word_rms=llm.word_rms)
    return VLM(VPG(encoder, made), joined, llm, prompt=PromptConfig())


def counted(vlm: VLM, *, images: int = 2) -> tuple[int, int, int]:
    """Torch's count of an update of `images` captions; tokens of each, and targets of all."""
    encoded = vlm.splice.prompter.encode(CAPTION)
    with torch.no_grad():  # the first one measures what the family does behind its head
        vlm.splice.token_nll(torch.zeros(1, vlm.vpg.tokens, vlm.llm.width), [encoded])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        prompts = vlm.prompts_from(vlm.vpg(torch.rand(images, 3, SIDE, SIDE)))
        nll, _ = vlm.splice.token_nll(prompts, [encoded] * images)
        if nll.requires_grad:
            nll.sum().backward()
    return int(counter.get_total_flops()), len(encoded) - 1, len(nll)


def stage(**trainable: str) -> Stage:
    return Stage.model_validate({"name": "s", "trainable": trainable, "budget": {"samples": 1}})


def unseen(vlm: VLM, length: int) -> float:
    """FLOPs of an update's scores between words that don't see each other: torch computes and counts them, too."""
    config = vlm.language_model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 3 * config.num_hidden_layers * 4 * config.num_attention_heads * width * length * (length - 1) / 2


FRONTS = {
    "warm-up": {"projector": "full"},
    "fine-tune": {"connector": "full", "projector": "full"},
    "everything": {"encoder": "full", "connector": "full", "projector": "full", "llm": "full"},
    "lora": {"projector": "full", "llm": "lora"},
    "frozen between": {"encoder": "full", "projector": "full"},
}


def check(vlm: VLM, trainable: dict[str, str], *, tolerance: float) -> None:
    of = stage(**trainable)
    set_trainable(vlm, of)
    truth, length, targets = counted(vlm)
    found = update_flops(vlm, of.trainable, lengths=[length] * 2, targets=targets, images=2, encoded=2)
    assert found + 2 * unseen(vlm, length) == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "opt-project-in", "qwen3", "gpt2"])
def test_a_warm_up_of_each_family(tmp_path: Path, family: str) -> None:
    # rotary angles are counted by torch as a product, too
    check(build(tmp_path, family), FRONTS["warm-up"], tolerance=0.005)


@pytest.mark.parametrize("name", FRONTS)
def test_what_trains_where(tmp_path: Path, name: str) -> None:
    check(build(tmp_path, "opt"), FRONTS[name], tolerance=1e-6 if name != "everything" else 0.005)


@pytest.mark.parametrize(
    "connector",
    [
        {"kind": "resampler", "queries": 3, "width": 16, "layers": 1, "heads": 2, "hidden": 32},
        {"kind": "cross-attention", "queries": 4, "width": 16, "heads": 2},
        {"kind": "pixel-shuffle"},
        {"kind": "merge"},
        {"kind": "identity"},
    ],
    ids=lambda keys: keys["kind"],
)
def test_connectors(tmp_path: Path, connector: dict[str, Any]) -> None:
    vlm = build(tmp_path, "opt", connector, ProjectorConfig(kind="mlp"))
    check(vlm, FRONTS["fine-tune"], tolerance=1e-6)


def test_cached_features_cost_no_encoder_and_a_frozen_connector_nothing(tmp_path: Path) -> None:
    vlm = build(tmp_path)
    update = {"lengths": [10, 20], "targets": 5, "images": 2}
    warmup, tune = stage(**FRONTS["warm-up"]), stage(**FRONTS["fine-tune"])
    set_trainable(vlm, warmup)
    cached = StageFlops(vlm, warmup.trainable)
    assert cached.update(**update, encoded=2) - cached.update(**update, encoded=0) == 2 * (
        cached.encoder + cached.connector
    )
    set_trainable(vlm, tune)
    tuned = StageFlops(vlm, tune.trainable).parts(**update, encoded=0)
    assert tuned["encoder"] == 0 < tuned["connector"]


def test_checkpoints_cost_a_second_forward_pass_of_the_blocks(tmp_path: Path) -> None:
    vlm = build(tmp_path)
    of = stage(**FRONTS["warm-up"])
    set_trainable(vlm, of)
    flops = StageFlops(vlm, of.trainable)
    update = {"lengths": [30], "targets": 10, "images": 1, "encoded": 0}
    extra = flops.update(**update, checkpointed=True) - flops.update(**update)
    head = vlm.language_model.get_output_embeddings().weight.numel()
    projector = flops.parts(**update)["projector"]
    blocks = flops.update(**update) - projector - 10 * 4 * head
    assert 2 * extra < blocks < 3 * extra  # gradients pass frozen weights: 2 of 4; of the scores it is 1 of 3
    assert flops.update(lengths=[], targets=0, images=0, encoded=0, checkpointed=True) == 0


def test_a_sliding_window_costs_less_than_all_before(tmp_path: Path) -> None:
    vlm = build(tmp_path, "gemma3")
    flops = StageFlops(vlm, {"projector": "full"})
    window = vlm.language_model.config.sliding_window

    def scores(length: int) -> float:
        """What is left of a sample when its positions are taken out."""
        many = {"targets": 0, "images": 0, "encoded": 0}
        return flops.update(lengths=[length], **many) - flops.update(lengths=[1] * length, **many)

    assert scores(8 * window) < 8 * 8 * scores(window) / 2


def test_gpus_are_found_by_name() -> None:
    assert gpus.find_gpu("a100-40gb").bf16 == 312e12
    with pytest.raises(UserError, match=r"did you mean H100-80GB\?.* Known types: .*A10G"):
        gpus.find_gpu("H100-80")
    assert all(gpu.memory < 200 * gpus.GIB and (gpu.bf16 or 2 * gpu.fp32) > gpu.fp32 for gpu in gpus.GPUS.values())


def test_a_device_is_known_by_its_exact_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA L4", "NVIDIA L4 of another kind"][index])
    assert gpus.of_device(0) is gpus.GPUS["L4"]
    assert gpus.of_device(1) is None
