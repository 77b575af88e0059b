"""Negative log-likelihood of tokens over a large vocabulary, without float32 copies of all logits.

`F.cross_entropy(logits.float(), targets)` holds the logits, their float32 copy and its log-softmax at once, and in the
backward pass a float32 gradient: of 80 tokens and 262,144 words 85 MB each. Here float32 exists for a few rows at a
time, and the backward pass takes the softmax anew from the logits that the model gave.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**22
"""Logits that are in float32 at a time: 16 MB."""


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, V] of any floating dtype, targets LongTensor[n] -> nats [n] in float32 (float64 of float64)."""
    return _TokenNLL.apply(logits, targets)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        nll, largest, rest = (torch.empty(len(logits), dtype=_wide(logits), device=logits.device) for _ in range(3))
        for rows in _chunks(logits):
            values = logits[rows].to(nll.dtype)
            largest[rows] = values.amax(dim=1)
            below = values - largest[rows, None]
            rest[rows] = below.logsumexp(dim=1)
            nll[rows] = rest[rows] - below.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(logits, targets, largest, rest)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, largest, rest = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            share = (logits[rows].to(rest.dtype) - largest[rows, None]).sub_(rest[rows, None]).exp_()
            share.scatter_add_(1, targets[rows, None], share.new_full((len(share), 1), -1.0))
            result[rows] = share.mul_(gradient[rows, None])
        return result, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
