"""The loss over a large vocabulary against torch's own, and that no float32 copy of all logits is made."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vpgtrans import token_loss
from vpgtrans.token_loss import token_nll


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK", 3 * 50)


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
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple | list) else [result]:
                if isinstance(item, torch.Tensor) and item.dtype == torch.float32:
                    sizes.append(item.numel())
            return result

    logits, targets, _ = drawn(12, torch.bfloat16)
    with Watch():
        token_nll(logits, targets).sum().backward()
    assert max(sizes) == 3 * 50  # of 12 * 50
