"""LoRA on a frozen half-precision layer, without float32 copies of what goes through it.

Where x is bf16 and A, B are float32, peft takes `base(x) + s · B(A(x.float()))` in float32: a float32 copy of x is kept
for the backward pass by every adapted layer (of q, k and v the same one three times), and four float32 tensors of the
output's size are made on the way. Here A and B are rounded to x's precision for the products, as autocast would do,
their gradients and updates stay float32, and x is kept as it is: several layers share it.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LeanLinear(Linear):
    """A LoRA layer of peft's, quicker while it trains on half precision; the same weights under the same names.

    What does not train (a validation, a caption) is computed as peft computes it wherever the adapter is loaded.
    """

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        if not self.training or args or named or self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return super().forward(x, *args, **named)
        [name] = self.active_adapters
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if x.dtype not in (torch.bfloat16, torch.float16) or down.dtype != torch.float32:
            return super().forward(x)
        found: Tensor = _Add.apply(self.base_layer(x), x, down, up, self.scaling[name])
        return found


def lean(model: nn.Module) -> None:
    """Have the plain LoRA layers of a model run so: those without dropout, variants or a quantised base."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and _is_plain(module):
            module.__class__ = LeanLinear


def _is_plain(module: Linear) -> bool:
    dropouts = all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values())
    biased = any(each.bias is not None for each in module.lora_B.values())
    return dropouts and not biased and not module.lora_variant


class _Add(torch.autograd.Function):
    """base [..., o] + s · B A x, of x [..., d], A [r, d] and B [o, r]."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        narrow = x.flatten(0, -2) @ down.to(x.dtype).T
        ctx.save_for_backward(x, narrow, down, up)
        ctx.scale = scale
        wide = (up * scale).to(x.dtype)
        return torch.addmm(base.flatten(0, -2), narrow, wide.T).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        x, narrow, down, up = ctx.saved_tensors
        given = gradient.flatten(0, -2)
        back = given @ (up * ctx.scale).to(x.dtype)  # [n, r]
        d_down = (back.T @ x.flatten(0, -2)).to(down.dtype)
        d_up = (given.T @ narrow).to(up.dtype) * ctx.scale
        d_x = (back @ down.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        return gradient, d_x, d_down, d_up, None
