"""Causal attention of short samples in half precision on a CPU.

Torch's fused attention is made for long sequences: of 175 tokens in bf16 its backward pass takes four times what plain
matrix products take, of 30 tokens more than that (`benchmarks/packed_step.py`). Here a few samples' scores exist at a
time, small enough to stay in the processor's cache, and the backward pass takes them anew instead of keeping them.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 512
"""Tokens of a sample, up to which this is faster."""
TOGETHER = 1 << 18
"""Scores that exist at a time."""


def is_short(query: Tensor) -> bool:
    """Whether `short_attention` is the faster way for query [k, H, l, d]."""
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and query.shape[2] <= LONGEST


def short_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """query [k, H, l, d], key and value [k, H', l, d] -> [k, H, l, d]; H is a multiple of H'.

    window: how many tokens each sees, itself included; None: all before it.
    """
    samples, heads, length, width = query.shape
    shared = heads // key.shape[1]
    # Heads that share keys are rows of one product.
    flat = query.reshape(samples * key.shape[1], shared * length, width)
    hidden = _hidden(length, window, shared, query.dtype)
    found: Tensor = _Short.apply(flat, key.flatten(0, 1), value.flatten(0, 1), hidden, scale)
    return found.view(samples, heads, length, -1)


@lru_cache(maxsize=32)
def _hidden(length: int, window: int | None, times: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores: -inf where a token is not seen; [times · l, l]."""
    with torch.inference_mode(False):  # it is kept, and training can't use what was made for inference alone
        place = torch.arange(length)
        behind = place[:, None] - place
        unseen = (behind < 0) | (behind >= (window or length))
        return torch.zeros(length, length, dtype=dtype).masked_fill_(unseen, -torch.inf).repeat(times, 1)


def forget() -> None:
    """Let go of masks that were kept: those of a mode in which tensors hold nothing are of no use after it."""
    _hidden.cache_clear()


class _Short(torch.autograd.Function):
    """q [n, m, d], k and v [n, l, d], hidden [m, l]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Tensor:
        found = q.new_empty(*q.shape[:2], v.shape[2])
        for part in _parts(q, k):
            torch.bmm(_weights(q[part], k[part], hidden, scale), v[part], out=found[part])
        ctx.save_for_backward(q, k, v, hidden)
        ctx.scale = scale
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, hidden = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in _parts(q, k):
            weights, given = _weights(q[part], k[part], hidden, ctx.scale), gradient[part]
            torch.bmm(weights.transpose(1, 2), given, out=dv[part])
            scores = torch._softmax_backward_data(
                torch.bmm(given, v[part].transpose(1, 2)), weights, -1, weights.dtype
            ).mul_(ctx.scale)
            torch.bmm(scores, k[part], out=dq[part])
            torch.bmm(scores.transpose(1, 2), q[part], out=dk[part])
        return dq, dk, dv, None, None


def _weights(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    return torch.softmax(torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale), dim=-1)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    size = max(1, TOGETHER // (q.shape[1] * k.shape[1]))
    return [slice(start, start + size) for start in range(0, len(q), size)]
