"""Depthwise convolution: its gradients, and its form for inference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.choice import is_plain, lowered


class _DepthwiseConv2d(torch.autograd.Function):
    """Depthwise convolution of stride 1 that keeps the size; see `depthwise_conv2d`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        channels, _, size, _ = weight.shape
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=size // 2, groups=channels)
        if ctx.needs_input_grad[1]:
            grad_weight = _depthwise_weight_gradient(x, grad, size).to(weight.dtype)
        return grad_x, grad_weight


def _depthwise_weight_gradient(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """Gradient of the kernel: an image's share is its depthwise convolution with its own ``grad`` as the kernel.

    So it runs at the speed of a forward pass. Each image by itself needs no copy; small maps are taken eight at a time,
    side by side as channels, because each call has a price of its own.

    Shape: x and grad (B, C, H, W), channels last in memory -> (C, 1, size, size), float32.
    """
    _, channels, height, width = x.shape
    together = 8 if height * width <= 16 else 1
    total = torch.zeros(channels, 1, size, size, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for images, taps in zip(x.split(together), grad.split(together), strict=True):
        count = len(images)
        images = images.permute(2, 3, 0, 1).reshape(1, height, width, -1).permute(0, 3, 1, 2)  # (1, n C, H, W)
        shares = F.conv2d(images, taps.reshape(-1, 1, height, width), padding=size // 2, groups=count * channels)
        total += shares.view(count, channels, 1, size, size).sum(0, dtype=total.dtype)
    return total


def depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of stride 1 that keeps the size, with a backward pass made for CPUs.

    The library's gradient of a depthwise kernel on a CPU takes several times as long as all the rest of the
    convolution; see `_depthwise_weight_gradient` for what replaces it.

    Shape: x (B, C, H, W), channels last in memory, weight (C, 1, k, k) -> (B, C, H, W).
    """
    if is_plain() or x.device.type != "cpu" or not torch.is_grad_enabled():
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return _DepthwiseConv2d.apply(*lowered(x, weight))


def depthwise_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:  # fmt: skip
    """``SiLU(DWConv(x) + b)`` in one pass over the map, without a gradient; only where `fuses_inference`.

    Shape: x (B, C, H, W), channels last in memory, weight (C, 1, k, k), bias (C,) -> (B, C, H', W').
    """
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, weight.shape[0], "swish", [], ""
    )
