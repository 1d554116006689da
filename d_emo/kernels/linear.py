"""The matrix product of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.activation import Activation, activate
from d_emo.kernels.dispatch import prefers_onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: Activation = "none") -> Tensor:
    """``act(x W^T + b)``; without ``act`` it is ``torch.nn.functional.linear``.

    In float32 on an x86 CPU the library calls MKL, which reaches 40 GMAC/s on one core of a Zen 5; oneDNN, which is in
    the library too and uses AVX-512, reaches 70 to 110, in both directions.

    Shape: x (..., C), weight (D, C), bias (D,) -> (..., D).
    """
    if not prefers_onednn(x, weight, bias):
        return activate(F.linear(x, weight, bias), act)
    if torch.is_grad_enabled():
        return activate(_Linear.apply(x, weight, bias), act)
    return product(x, weight, bias, act)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: Activation = "none") -> Tensor:
    """oneDNN's ``act(x W^T + b)``, without a gradient.

    Shape: x (..., C), weight (D, C) of any strides, bias (D,) -> (..., D).
    """
    if torch.compiler.is_compiling():
        return _product_as_operator(x, weight, bias, act)
    name, kind = {"none": ("none", ""), "gelu": ("gelu", "none"), "silu": ("swish", "")}[act]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], kind)


@torch.library.custom_op("d_emo::product", mutates_args=())
def _product_as_operator(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """`product` as an operator that the compiler calls as it is; oneDNN's own it takes with constant weights only."""
    return product(x, weight, bias, act)


@_product_as_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` by the faster library, without a gradient. Shape: x (..., C), weight (D, C) -> (..., D)."""
    return product(x, weight) if prefers_onednn(x, weight) else F.linear(x, weight)


class _Linear(torch.autograd.Function):
    """`product` with its gradients: ``dx = g W``, ``dW = g^T x``, ``db`` the sum of ``g`` over the rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None  # (..., C)
        rows = grad.flatten(0, -2)  # (N, D)
        grad_weight = product(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None  # (D, C)
        grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None  # (D,)
        return grad_x, grad_weight, grad_bias
