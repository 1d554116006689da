"""Depthwise convolution: its gradients, and its form for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.dispatch import fuses_inference, lowered, uses_triton, wants_standard

TRITON_SIZES = (3, 5, 7)
"""The sizes of a kernel that Triton's form is written for."""


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
        if torch.compiler.is_compiling():
            return tuple(_gradients_as_operator(x, grad, weight))
        return depthwise_gradients(x, grad, weight, ctx.needs_input_grad)


@torch.library.custom_op("d_emo::depthwise_gradients", mutates_args=())
def _gradients_as_operator(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    """`depthwise_gradients` as an operator, which the compiler calls as it is."""
    return list(depthwise_gradients(x, grad, weight, (True, True)))


@_gradients_as_operator.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight)]


def depthwise_gradients(
    x: Tensor, grad: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a depthwise convolution of stride 1 that keeps the size, as far as they are needed.

    Shape: x and grad (B, C, H, W), channels last in memory, weight (C, 1, k, k) -> as x, as weight.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    channels, _, size, _ = weight.shape
    grad_x = F.conv2d(grad, weight.flip(2, 3), padding=size // 2, groups=channels) if needs[0] else None
    if not needs[1]:
        return grad_x, None
    small = x.shape[2] * x.shape[3] <= 16
    gradient = (_kernel_gradient_of_small_maps if small else _kernel_gradient)(x, grad, size)
    return grad_x, gradient.to(weight.dtype)


def _channel_rows(x: Tensor) -> Tensor:
    """Each channel's values side by side, copied. Shape: (B, C, H, W), channels last in memory -> (C, B H W)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).t().contiguous()


def _kernel_gradient(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """Gradient of the kernel: an image's share is its depthwise convolution with its own ``grad`` as the kernel.

    So it runs at the speed of a forward pass, and each image by itself needs no copy but that of its ``grad``.

    Shape: x and grad (B, C, H, W), channels last in memory -> (C, 1, size, size), at least float32.
    """
    _, channels, height, width = x.shape
    total = torch.zeros(channels, 1, size, size, dtype=torch.promote_types(x.dtype, torch.float32))
    for image, outer in zip(x.split(1), grad.split(1), strict=True):
        taps = _channel_rows(outer).view(channels, 1, height, width)
        total += F.conv2d(image, taps, padding=size // 2, groups=channels).view(total.shape)
    return total


def _kernel_gradient_of_small_maps(x: Tensor, grad: Tensor, size: int) -> Tensor:
    """`_kernel_gradient` where a convolution for each image costs more to call than to do.

    One product for each channel, over the batch, of every pixel of ``x`` with every pixel of ``grad``; a tap of the
    kernel is the sum over the pairs of pixels that are its offset apart.
    """
    batch, channels, height, width = x.shape
    dtype, pixels = torch.promote_types(x.dtype, torch.float32), height * width
    left, right = (_channel_rows(maps).view(channels, batch, pixels) for maps in (x, grad))
    pairs = torch.bmm(left.mT, right).to(dtype).view(channels, -1)  # (C, H W of x, H W of grad)
    lone = torch.eye(pixels, dtype=dtype).view(pixels, 1, height, width)  # one pixel each
    offsets = F.unfold(lone, size, padding=size // 2).mT.reshape(-1, size**2)  # (H W H W, k k), zeros and ones
    return (pairs @ offsets).view(channels, 1, size, size)


def convolves_on_gpu(x: Tensor, size: int) -> bool:
    """Whether Triton's depthwise convolution takes this map and a kernel of ``size`` x ``size``."""
    return size in TRITON_SIZES and uses_triton(x)


def depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of stride 1 that keeps the size, with a backward pass made for CPUs, and one for GPUs.

    The library's gradient of a depthwise kernel on a CPU takes several times as long as all the rest of the
    convolution; see `_kernel_gradient` for what replaces it.

    Shape: x (B, C, H, W), channels last in memory, weight (C, 1, k, k) -> (B, C, H, W).
    """
    if convolves_on_gpu(x, weight.shape[-1]):
        from d_emo.kernels.gpu import local

        return local.depthwise_conv2d(lowered(x)[0].permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
    if x.device.type != "cpu" or wants_standard() or not torch.is_grad_enabled():
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return _DepthwiseConv2d.apply(*lowered(x, weight))


def fuses_activation(x: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether `depthwise_silu` takes this map and this convolution; otherwise the plain steps are wanted."""
    if torch.is_grad_enabled():
        return False
    return fuses_inference(x) or (stride == dilation == (1, 1) and convolves_on_gpu(x, weight.shape[-1]))


def depthwise_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:  # fmt: skip
    """``SiLU(DWConv(x) + b)`` in one pass over the map, without a gradient; only where `fuses_activation`.

    Shape: x (B, C, H, W), channels last in memory, weight (C, 1, k, k), bias (C,) -> (B, C, H', W').
    """
    if convolves_on_gpu(x, weight.shape[-1]):
        from d_emo.kernels.gpu import local

        return local.depthwise_silu(lowered(x)[0].permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, weight.shape[0], "swish", [], ""
    )
