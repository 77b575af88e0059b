"""The loss over a large vocabulary against torch's own, and that neither all logits nor float32 copies are made."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vpgtrans import token_loss
from vpgtrans.token_loss import After, head_nll, token_nll


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", 3 * 50)
    monkeypatch.setattr(token_loss, "AT_ONCE", 5 * 50)


def drawn(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, 50, generator=generator).mul(4).to(dtype).requires_grad_()
    return logits, torch.randint(50, (count,), generator=generator), torch.rand(count, generator=generator)


@pytest.mark.parametrize("count", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(count: int, dtype: torch.dtype) -> None:
    logits, targets, weights = drawn(count, dtype)
    other = logits.detach().clone().requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = F.cross_entropy(other.to(wide), targets, reduction="none")
    found = token_nll(logits, targets)
    assert found.dtype == wide
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    # a bf16 gradient is rounded once here and there, from float32 values that may differ in the last bit
    torch.testing.assert_close(logits.grad, other.grad, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits, targets, _ = drawn(7, torch.float64)
    assert torch.autograd.gradcheck(lambda values: token_nll(values, targets), (logits,))


def test_logits_of_great_size_neither_overflow_nor_vanish() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], requires_grad=True)
    found = token_nll(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([0.0, torch.tensor(3.0).log().item()]))
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_float32_exists_for_a_few_rows_at_a_time() -> None:
    logits, targets, _ = drawn(12, torch.bfloat16)
    with Watch() as made:
        token_nll(logits, targets).sum().backward()
    assert made.largest[torch.float32] == 3 * 50  # of 12 * 50


class Watch(TorchDispatchMode):
    """Notes the size of the largest tensor of each dtype that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else [result]:
            if isinstance(item, torch.Tensor):
                self.largest[item.dtype] = max(self.largest.get(item.dtype, 0), item.numel())
        return result


AFTER = [After(), After(scale=0.25), After(cap=2.0), After(scale=3.0, cap=5.0)]


def of_head(count: int, dtype: torch.dtype, *, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(count, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(dtype)
    return hidden, weight, torch.randn(50, generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("count", "dtype"), [(0, torch.float32), (1, torch.float32), (12, torch.float32),
                                              (12, torch.bfloat16)])  # fmt: skip
def test_the_loss_of_a_head_and_its_gradient_are_those_of_all_logits(
    count: int, dtype: torch.dtype, bias: bool, after: After
) -> None:
    _, targets, weights = drawn(count, dtype)
    hidden, weight, shift = of_head(count, dtype, bias=bias)
    other = hidden.detach().clone().requires_grad_()
    logits = F.linear(other, weight, shift) * after.scale
    if after.cap is not None:
        logits = torch.tanh(logits / after.cap) * after.cap
    expected = F.cross_entropy(logits.float(), targets, reduction="none")
    found = head_nll(hidden, weight, shift, targets, after)
    assert found.dtype == torch.float32
    tolerance = 2**-5 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad, other.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("after", AFTER, ids=str)
def test_the_gradient_by_the_heads_input_is_that_of_finite_differences(after: After) -> None:
    _, targets, _ = drawn(7, torch.float64)
    hidden, weight, shift = of_head(7, torch.float64, bias=True)
    assert torch.autograd.gradcheck(lambda values: head_nll(values, weight, shift, targets, after), (hidden,))


def test_logits_exist_for_a_few_rows_at_a_time_and_none_is_kept() -> None:
    _, targets, _ = drawn(12, torch.bfloat16)
    hidden, weight, _ = of_head(12, torch.bfloat16, bias=False)
    kept: list[int] = []
    with (
        Watch() as made,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        head_nll(hidden, weight, None, targets, After()).sum().backward()
    assert made.largest[torch.bfloat16] <= max(5 * 50, weight.numel())
    assert made.largest[torch.float32] == 3 * 50
    assert kept == [hidden.numel()]


def test_without_a_gradient_only_the_loss_is_computed() -> None:
    _, targets, _ = drawn(12, torch.float32)
    hidden, weight, _ = of_head(12, torch.float32, bias=False)
    with torch.no_grad():
        found = head_nll(hidden, weight, None, targets, After())
    assert not found.requires_grad
    assert torch.equal(found, head_nll(hidden, weight, None, targets, After()))


def test_under_autocast_the_head_computes_in_half_precision() -> None:
    _, targets, _ = drawn(12, torch.float32)
    hidden, weight, shift = of_head(12, torch.float32, bias=True)
    assert shift is not None
    with torch.autocast("cpu", torch.bfloat16):
        found = head_nll(hidden, weight, shift, targets, After())
        expected = token_nll(F.linear(hidden, weight, shift), targets)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
