"""Layer norm with adaLN's shift and scale, in training.

    u = (LN(x) w + b) (1 + scale) + shift = LN(x) factor + offset,  both (B, C)

Step by step, a network keeps x, the norm's output and, in the linear layers after it, u. Here the norm's output is made
anew in the backward pass.
"""

from typing import Any

import torch
from torch import Tensor, nn

from d_emo.kernels.dispatch import Form, opaque, run


def modulated_norm(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, with one shift and one scale per image and channel: DiT's adaLN.

    Shape: x (B, H, W, C), shift and scale (B, C) -> (B, H, W, C).
    """
    return run("modulated_norm", MODULATED_NORM, x, norm, shift, scale)


def _two_steps(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale[:, None, None]) + shift[:, None, None]


def _one_step(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    weight, bias = norm.weight, norm.bias
    scale = 1 + scale.to(x.dtype)
    factor = scale if weight is None else scale * weight  # (B, C)
    offset = shift.to(x.dtype) if bias is None else torch.addcmul(shift.to(x.dtype), scale, bias)  # (B, C)
    return _NormAffine.apply(x, factor, offset, norm.eps)


def _one_step_refuses(x: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor) -> str | None:
    if not torch.is_grad_enabled():
        return "gradients are off"
    if torch.compiler.is_compiling():
        return "the compiler joins small steps itself"
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return "not in float32 or float64 on a CPU"
    if why := opaque(norm):
        return why
    if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
        return f"{type(norm).__name__} is no layer norm over the channels"
    if any(p is not None and (p.dtype != x.dtype or p.device != x.device) for p in (norm.weight, norm.bias)):
        return "the norm's parameters are in another precision"
    return None


MODULATED_NORM = (Form("one step", _one_step, _one_step_refuses), Form("norm, then modulation", _two_steps))


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
