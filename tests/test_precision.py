"""In which precision a run computes: the frozen encoder's is the LLM's on a GPU, and float32 parts stand beside it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import WARMUP, Tiny

from vpgtrans import runs
from vpgtrans.runs import journey
from vpgtrans.runs.parts import encoder_dtype
from vpgtrans.training.config import Stage


def test_a_frozen_encoder_runs_in_the_llms_precision_on_a_gpu(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    fast = tiny.transfer_recipe(trainer={"precision": "bf16-true"})
    assert encoder_dtype(fast, gpu) == torch.bfloat16
    assert encoder_dtype(fast, cpu) == torch.float32
    assert encoder_dtype(tiny.transfer_recipe(trainer={"precision": "fp32"}), gpu) == torch.float32
    trains = WARMUP | {"trainable": {"encoder": "full", "projector": "full"}}
    assert encoder_dtype(fast.model_copy(update={"stages": [Stage.model_validate(trains)]}), gpu) == torch.float32


@pytest.mark.parametrize("cached", [True, False])
def test_an_encoder_in_half_precision_goes_with_the_other_parts(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    monkeypatch.setattr("vpgtrans.runs.start.encoder_dtype", lambda *_: torch.bfloat16)
    joined = []
    begin = journey.begin

    def watched(*arguments, **options):
        joined.append(begin(*arguments, **options))
        return joined[0]

    monkeypatch.setattr(journey, "begin", watched)
    recipe = tiny.transfer_recipe()
    stages = [stage.model_copy(update={"cache_features": cached}) for stage in recipe.stages]
    run = runs.transfer(recipe.model_copy(update={"stages": stages}), output=tmp_path / "run", device="cpu")
    loss = json.loads((run / "summary.json").read_text())["val_loss"]
    vlm = joined[0].vlm
    assert {p.dtype for p in vlm.vpg.encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in [*vlm.vpg.connector.parameters(), *vlm.projector.parameters()]} == {torch.float32}
    reopened = runs.evaluate(str(run), data=[str(tiny.validation)], device="cpu")
    assert reopened[str(tiny.validation)]["val_loss"] == pytest.approx(loss, rel=0.02)


def test_an_encoder_that_a_vlm_carries_is_handed_on_bit_for_bit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains = WARMUP | {"trainable": {"encoder": "full", "projector": "full"}}
    first = runs.transfer(tiny.transfer_recipe(stages=[trains]), output=tmp_path / "first", device="cpu")
    monkeypatch.setattr("vpgtrans.runs.start.encoder_dtype", lambda *_: torch.bfloat16)
    recipe = tiny.transfer_recipe(source={"vpg": str(first)}, stages=[WARMUP])
    second = runs.transfer(recipe, output=tmp_path / "second", device="cpu")
    weights = Path("vlm/encoder/model.safetensors")
    assert (second / weights).read_bytes() == (first / weights).read_bytes()
