"""Negative log-likelihood of tokens over a large vocabulary, without all logits or float32 copies of them.

`F.cross_entropy(logits.float(), targets)` holds the logits, their float32 copy and its log-softmax at once, and in the
backward pass a float32 gradient: of 80 tokens and 262,144 words 85 MB each.

`token_nll` takes logits; float32 exists for a few rows at a time, and the backward pass takes the softmax anew from
them. `head_nll` takes what the output head takes: logits exist for some rows at a time, too. While a row's logits are
there, so is the gradient of its loss by the head's input, (softmax - target) · W, which is all that is kept of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22
"""Logits that are in float32 at a time: 16 MB."""
AT_ONCE = 2**24
"""Logits that `head_nll` has at a time: 32 MB in bf16, 64 rows of the largest vocabularies."""
ON_GPU = 8
"""Times as many of both on a GPU, which needs more rows to be busy."""


@dataclass(frozen=True)
class After:
    """What a model does to its head's logits: `cap · tanh(scale · logits / cap)`, or `scale · logits` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def back(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient by what came in, in place; `logits` are what went out."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, V] of any floating dtype, targets LongTensor[n] -> nats [n] in float32 (float64 of float64)."""
    return _TokenNLL.apply(logits, targets)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        nll, largest, rest = _nll(logits, targets)
        ctx.save_for_backward(logits, targets, largest, rest)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, largest, rest = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            share = _share(logits[rows], targets[rows], largest[rows], rest[rows])
            result[rows] = share.mul_(gradient[rows, None])
        return result, None


def head_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, after: After) -> Tensor:
    """The same of a frozen linear head's logits, `after(hidden @ weightᵀ + bias)`.

    Args:
        hidden: [n, d]. weight: [V, d] and bias: [V], which get no gradient. targets: LongTensor[n].
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.detach().to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _HeadNLL.apply(hidden, weight.detach(), None if bias is None else bias.detach(), targets, after)


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, after: After) -> Tensor:
        nll = torch.empty(len(hidden), dtype=_wide(hidden), device=hidden.device)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for rows in _slices(len(hidden), len(weight), AT_ONCE, hidden.device):
            logits = after(torch.nn.functional.linear(hidden[rows], weight, bias))
            nll[rows], largest, rest = _nll(logits, targets[rows])
            if by_hidden is not None:
                for some in _chunks(logits):
                    share = _share(logits[some], targets[rows][some], largest[some], rest[some])
                    logits[some] = after.back(share, logits[some])
                by_hidden[rows] = logits @ weight
        ctx.save_for_backward(by_hidden)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return (by_hidden * gradient[:, None]).to(by_hidden.dtype), None, None, None, None


def _nll(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row its loss, its largest logit, and the logarithm of the sum of exponentials above that."""
    nll, largest, rest = (torch.empty(len(logits), dtype=_wide(logits), device=logits.device) for _ in range(3))
    for rows in _chunks(logits):
        values = logits[rows].to(nll.dtype)
        largest[rows] = values.amax(dim=1)
        below = values - largest[rows, None]
        rest[rows] = below.logsumexp(dim=1)
        nll[rows] = rest[rows] - below.gather(1, targets[rows, None])[:, 0]
    return nll, largest, rest


def _share(logits: Tensor, targets: Tensor, largest: Tensor, rest: Tensor) -> Tensor:
    """Softmax minus one-hot targets: the gradient of each row's loss by its logits."""
    share = (logits.to(rest.dtype) - largest[:, None]).sub_(rest[:, None]).exp_()
    return share.scatter_add_(1, targets[:, None], share.new_full((len(share), 1), -1.0))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> list[slice]:
    return _slices(len(logits), logits.shape[1], CHUNK, logits.device)


def _slices(rows: int, columns: int, at_once: int, device: torch.device) -> list[slice]:
    size = max(1, at_once * (ON_GPU if device.type == "cuda" else 1) // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]
