"""A linear layer with the activation after it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo.kernels.activation import Activation, activate, activation_of
from d_emo.kernels.dispatch import Form, onednn_refuses, opaque, run, why_standard


def linear(layer: nn.Module, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """``act(layer(x))``, for an ``nn.Linear`` by the faster library; see `product`.

    Args:
        layer: a linear layer; anything else that maps (..., C) to (..., D) is called as a module.
        x: the map.
        act: activation after it, or None.

    Shape: x (..., C) -> (..., D).
    """
    return run("linear", LINEAR, x, layer, act)


def unactivated(layer: nn.Module | None, x: Tensor, act: nn.Module | None) -> tuple[Tensor, Activation]:
    """A value before its activation, and the activation still to come; "none" where it costs nothing to apply here.

    Shape: x (..., C) -> (..., D).
    """
    if layer is None:
        return x, "none"
    kind = activation_of(act)
    if kind is None or why_standard() or _joined_refuses(x, layer, act) is None:
        return linear(layer, x, act), "none"
    return linear(layer, x), kind


def _joined_refuses(x: Tensor, layer: nn.Module, act: nn.Module | None) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are on"
    return _onednn_layer_refuses(x, layer, act) or (activation_of(act) is None and "its activation is another") or None


def _onednn_layer_refuses(x: Tensor, layer: nn.Module, act: nn.Module | None) -> str | None:
    if why := opaque(layer):
        return why
    if type(layer) is not nn.Linear:
        return f"{type(layer).__name__} is no linear layer"
    return onednn_refuses(x, layer.weight, layer.bias)


def _joined(x: Tensor, layer: nn.Linear, act: nn.Module | None) -> Tensor:
    return product(x, layer.weight, layer.bias, activation_of(act))


def _products(x: Tensor, layer: nn.Linear, act: nn.Module | None) -> Tensor:
    multiply = _Linear.apply if torch.is_grad_enabled() else product
    y = multiply(x, layer.weight, layer.bias)
    return y if act is None else act(y)


def _library(x: Tensor, layer: nn.Module, act: nn.Module | None) -> Tensor:
    return layer(x) if act is None else act(layer(x))


LINEAR = (
    Form("products, activation inside", _joined, _joined_refuses),
    Form("products", _products, _onednn_layer_refuses),
    Form("the modules", _library),
)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: Activation = "none") -> Tensor:
    """``act(x W^T + b)`` by the faster library, without a gradient.

    In float32 on an x86 CPU PyTorch calls MKL; oneDNN, which is in PyTorch too, is twice as fast with AVX-512 on a
    Zen 5, and slower on a Xeon.

    Shape: x (..., C), weight (D, C) of any strides, bias (D,) -> (..., D).
    """
    if torch.compiler.is_compiling():
        return _product_as_operator(x, weight, bias, act)
    return run("product", PRODUCT, x, weight, bias, act)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation) -> Tensor:
    name, kind = {"none": ("none", ""), "gelu": ("gelu", "none"), "silu": ("swish", "")}[act]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], kind)


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation) -> Tensor:
    return activate(F.linear(x, weight, bias), act)


PRODUCT = (
    Form("oneDNN", _by_onednn, lambda x, weight, bias, act: onednn_refuses(x, weight, bias), rival=True),
    Form("the library", _by_library, rival=True),
)


@torch.library.custom_op("d_emo::product", mutates_args=())
def _product_as_operator(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """`product` as an operator that the compiler calls as it is; oneDNN's own it takes with constant weights only."""
    return product(x, weight, bias, act)


@_product_as_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


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
