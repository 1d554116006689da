"""Layer norm with adaLN's shift and scale, in training.

    u = (LN(x) w + b) (1 + scale) + shift = LN(x) factor + offset,  both (B, C)

Step by step, a network keeps x, the norm's output and, in the linear layers after it, u. Here the norm's output is made
anew in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d_emo.kernels.dispatch import is_plain


def fuses_modulation(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether `modulated_norm` takes this map and these parameters; otherwise the plain steps are wanted."""
    if is_plain() or not torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    if x.dtype not in (torch.float32, torch.float64):
        return False
    return all(p is None or (p.dtype == x.dtype and p.device == x.device) for p in parameters)


def modulated_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """``LayerNorm(x) * (1 + scale) + shift``, with one shift and one scale per image; only where `fuses_modulation`.

    Shape: x (B, H, W, C), weight and bias (C,), shift and scale (B, C) -> (B, H, W, C).
    """
    scale = 1 + scale.to(x.dtype)
    factor = scale if weight is None else scale * weight  # (B, C)
    offset = shift.to(x.dtype) if bias is None else torch.addcmul(shift.to(x.dtype), scale, bias)  # (B, C)
    return _NormAffine.apply(x, factor, offset, eps)


class _NormAffine(torch.autograd.Function):
    """``LN(x) * factor + offset``; all but the maps is left to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, offset: Tensor, eps: float) -> Tensor:
        normed, mean, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, mean, scale, factor)
        ctx.eps = eps
        return torch.addcmul(offset[:, None, None], normed, factor[:, None, None], out=normed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale, factor = ctx.saved_tensors
        normed = torch.native_layer_norm(x, x.shape[-1:], None, None, ctx.eps)[0]  # (B, H, W, C)
        grad_factor = normed.mul_(grad).sum((1, 2))  # (B, C)
        grad_x = torch.ops.aten.native_layer_norm_backward(
            grad * factor[:, None, None], x, x.shape[-1:], mean, scale, None, None, [True, False, False]
        )[0]
        return grad_x, grad_factor, grad.sum((1, 2)), None
