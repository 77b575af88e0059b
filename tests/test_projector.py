"""Projectors: shapes, the norm, composing with converters, and strict saving and loading."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vpgtrans.config import ProjectorConfig
from vpgtrans.errors import CheckpointError, RecipeError, TransferError
from vpgtrans.projector import Projector, compose, load_projector

CONFIGS = [
    ProjectorConfig(kind="linear", norm=False),
    ProjectorConfig(kind="linear", norm=False, bias=False),
    ProjectorConfig(kind="mlp", norm=False, depth=3, hidden=9),
    ProjectorConfig(kind="mlp", norm=False, bias=False, activation="relu"),
    ProjectorConfig(kind="linear", norm=True),
    ProjectorConfig(kind="mlp", norm=True, bias=False),
    ProjectorConfig(kind="linear", norm=True, tail=True),
]


def built(config: ProjectorConfig, *, seed: int = 0, width_in: int = 6, width_out: int = 8) -> Projector:
    torch.manual_seed(seed)
    projector = Projector(config, width_in, width_out, word_rms=0.13, norm_width=5 if config.tail else None)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    return projector.double()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), width=st.integers(1, 12), again=st.integers(1, 12))
def test_composed_prompts_equal_converted_prompts_twice_over(config, seed, width, again):
    projector = built(config, seed=seed)
    tokens = torch.randn(3, 4, 6).double()
    expected = projector(tokens)
    composed = projector
    for d_out in (width, again):
        weight, bias = torch.randn(d_out, expected.shape[-1]).double(), torch.randn(d_out).double()
        before = {name: tensor.clone() for name, tensor in composed.state_dict().items()}
        after = compose(composed, weight, bias)
        assert all(torch.equal(before[name], tensor) for name, tensor in composed.state_dict().items())
        composed, expected = after, expected @ weight.T + bias
        torch.testing.assert_close(composed(tokens), expected, rtol=1e-10, atol=1e-10)
        assert composed.width_out == d_out
        assert composed.config.tail == config.norm
        assert composed.training == projector.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_composing_keeps_the_dtype(dtype):
    projector = built(CONFIGS[0]).to(dtype)
    composed = compose(projector, torch.randn(3, 8), torch.randn(3))
    assert {parameter.dtype for parameter in composed.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_brings_prompts_to_the_words_rms_times_the_gain(dtype):
    projector = Projector(ProjectorConfig(), 6, 8, word_rms=0.13).to(dtype)
    torch.nn.init.constant_(projector.gain, 2.0)
    # Large enough for squares to overflow in float16.
    prompts = projector(torch.randn(5, 6, dtype=dtype) * 2000)
    assert prompts.dtype == dtype
    torch.testing.assert_close(
        prompts.float().square().mean(-1).sqrt(),
        torch.full((5,), 0.26),
        rtol=2e-2 if dtype != torch.float32 else 1e-5,
        atol=0,
    )


def test_a_zero_vector_stays_finite_with_finite_gradients():
    projector = Projector(ProjectorConfig(bias=False), 6, 8)
    tokens = torch.zeros(2, 6, requires_grad=True)
    projector(tokens).sum().backward()
    assert torch.isfinite(tokens.grad).all()


def test_an_mlp_follows_the_formula():
    projector = built(ProjectorConfig(kind="mlp", norm=False))
    first, last = projector.layers
    tokens = torch.randn(7, 6).double()
    hidden = tokens @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(projector(tokens), hidden @ last.weight.T + last.bias)
    assert projector.config.hidden == 8


def test_a_fresh_tail_keeps_the_scale_when_narrowing():
    torch.manual_seed(0)
    projector = Projector(ProjectorConfig(tail=True), 6, 32, word_rms=0.5, norm_width=64)
    assert 0.4 < projector(torch.randn(500, 6)).square().mean().sqrt() < 0.6


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_gives_the_same_prompts(tmp_path, config, dtype):
    projector = compose(built(config), torch.randn(4, 8), torch.randn(4)).to(dtype)
    projector.save(tmp_path)
    loaded = load_projector(tmp_path)
    tokens = torch.randn(2, 6, dtype=dtype)
    assert torch.equal(loaded(tokens), projector(tokens))
    assert (loaded.config, loaded.norm_width) == (projector.config, projector.norm_width)
    assert load_projector(tmp_path, dtype=torch.float64)(tokens.double()).dtype == torch.float64


def _missing(state):
    del state["layers.0.bias"]


def _extra(state):
    state["layers.1.bias"] = torch.zeros(3)


def _misshaped(state):
    state["layers.0.weight"] = state["layers.0.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("damage", "named"), [(_missing, "layers.0.bias"), (_extra, "layers.1.bias"), (_misshaped, "layers.0.weight")]
)
def test_loading_names_the_tensor_that_does_not_fit(tmp_path, damage, named):
    Projector(ProjectorConfig(), 6, 8).save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        load_projector(tmp_path)


def test_loading_reports_a_bad_config_and_a_truncated_file(tmp_path):
    Projector(ProjectorConfig(), 6, 8).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="safetensors"):
        load_projector(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["width_out"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="width_out"):
        load_projector(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match="JSON"):
        load_projector(tmp_path)


def test_wrong_shapes_and_names_are_refused():
    projector = Projector(ProjectorConfig(), 6, 8)
    with pytest.raises(TransferError, match="d_out, 8"):
        compose(projector, torch.randn(8, 7), torch.randn(8))
    with pytest.raises(TransferError, match="bias"):
        compose(projector, torch.randn(5, 8), torch.randn(8))
    with pytest.raises(RecipeError, match="gellu"):
        Projector(ProjectorConfig(activation="gellu"), 6, 8)
    with pytest.raises(TransferError, match="norm_width"):
        Projector(ProjectorConfig(), 6, 8, norm_width=7)
