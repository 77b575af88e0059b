"""LoRA without float32 copies: the same function as peft's to half precision, and less kept for the backward pass."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from tiny import tiny_llm
from torch import nn

from vpgtrans.config import LoRAConfig
from vpgtrans.lean_lora import LeanLinear, lean
from vpgtrans.llm import open_llm
from vpgtrans.training.parts import add_adapter


def adapted(dtype: torch.dtype = torch.bfloat16, **options) -> nn.Module:
    """Two linear layers with LoRA whose output is not zero, in train mode."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40, bias=False), nn.Linear(40, 24)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def gradients(model: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    given = x.clone().requires_grad_()
    found = model(given)
    (found * weight).sum().backward()
    of = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"output": found.detach(), "x": given.grad} | of


def test_it_is_pefts_function_to_half_precision_and_gradients_stay_float32():
    exact, model = adapted(torch.float32), adapted()
    exact.load_state_dict(model.state_dict())
    lean(model)
    assert sum(isinstance(module, LeanLinear) for module in model.modules()) == 2
    x, weight = torch.randn(3, 50, 24).bfloat16(), torch.randn(3, 50, 24).bfloat16()
    right, found = gradients(exact.double(), x.double(), weight.double()), gradients(model, x, weight)
    assert set(right) == set(found)
    for name, tensor in right.items():
        assert (found[name].double() - tensor).norm() < 0.01 * tensor.norm(), name
        assert found[name].dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_nothing_of_xs_size_is_kept_in_float32():
    kept: dict[str, int] = {}
    for name in ("peft", "lean"):
        model = adapted()
        if name == "lean":
            lean(model)
        sizes: list[int] = []
        x = torch.randn(1, 500, 24).bfloat16().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: sizes.append(tensor.numel() * (tensor.dtype == torch.float32)) or tensor,
            lambda tensor: tensor,
        ):
            model(x)
        kept[name] = max(sizes)
    assert kept["peft"] >= 500 * 24
    assert kept["lean"] < 500


@pytest.mark.parametrize("case", ["eval", "float32", "disabled"])
def test_where_nothing_is_gained_it_is_peft_bit_for_bit(case):
    model = adapted(torch.float32 if case == "float32" else torch.bfloat16)
    own = copy.deepcopy(model)
    lean(own)
    assert own.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 7, 24, dtype=torch.float32 if case == "float32" else torch.bfloat16)
    if case == "disabled":
        with model.disable_adapter(), own.disable_adapter():
            assert torch.equal(model(x), own(x))
        return
    for each in (model, own):
        each.train(case != "eval")
    assert torch.equal(model(x), own(x))


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_layers_that_do_more_stay_pefts(options):
    model = adapted(**options)
    lean(model)
    assert not any(isinstance(module, LeanLinear) for module in model.modules())
    assert sum(type(module) is Linear for module in model.modules()) == 2


def test_an_llm_that_trains_by_lora_in_half_precision_has_lean_layers(tmp_path):
    llm = open_llm(str(tiny_llm("llama", tmp_path)), dtype=torch.bfloat16)
    vlm = SimpleNamespace(llm=llm, language_model=llm.model)
    add_adapter(vlm, LoRAConfig(rank=2))
    layers = [module for module in vlm.language_model.modules() if isinstance(module, Linear)]
    assert len(layers) == 7 * llm.fingerprint.layers
    assert all(isinstance(layer, LeanLinear) for layer in layers)
