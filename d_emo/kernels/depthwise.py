"""The local convolution of a block, ``SiLU(BN(DWConv(x)))``: the convolution's gradients, and one pass in inference.

Its norm is duck-typed: what has a ``bn`` and is `known` is a batch norm over the last axis, with an ``affine()`` form.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo.kernels.dispatch import Form, lowered, onednn_refuses, opaque, run, triton_refuses
from d_emo.kernels.partitions import channels_first, channels_last

TRITON_SIZES = (3, 5, 7)
"""The sizes of a kernel that Triton's form is written for."""


class _DepthwiseConv2d(torch.autograd.Function):
    """Depthwise convolution of stride 1 that keeps the size, with a backward pass made for CPUs.

    The library's gradient of a depthwise kernel on a CPU takes several times as long as all the rest of the
    convolution; see `_kernel_gradient` for what replaces it.
    """

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


def local_conv(conv: nn.Module, norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """``act(norm(conv(x)))`` with a depthwise convolution of channels-last maps.

    Args:
        conv: takes channels-first maps, as an ``nn.Conv2d``.
        norm: takes channels-last maps.
        act: activation.
        x: the map.

    Shape: x (B, H, W, M) -> (B, ceil(H / stride), ceil(W / stride), M).
    """
    return run("local_conv", LOCAL_CONV, x, conv, norm, act)


def geometry_refuses(conv: nn.Module, *, strided: bool = False) -> str | None:
    """Why this is no depthwise convolution as operators know it, or None; ``strided``: with any stride and dilation."""
    if why := opaque(conv):
        return why
    if type(conv) is not nn.Conv2d or not conv.groups == conv.in_channels == conv.out_channels:
        return "no depthwise convolution"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return "no padding with a number of zeros"
    size = conv.kernel_size[0]
    if strided or (conv.stride == conv.dilation == (1, 1) and conv.kernel_size == (size, size) and size % 2
                   and conv.padding == (size // 2, size // 2)):  # fmt: skip
        return None
    return "strided, dilated, or of another size than its map"


def affine_refuses(norm: nn.Module, act: nn.Module) -> str | None:
    """Why there is more than an affine map between convolution and SiLU, or None: a batch norm in eval mode, or no
    norm."""
    bn = getattr(norm, "bn", None)
    if why := opaque(norm, act) or (bn is not None and opaque(bn)):
        return why
    if type(act) is not nn.SiLU:
        return f"{type(act).__name__} is no SiLU"
    if bn is None:
        return None if type(norm) is nn.Identity else f"{type(norm).__name__} is no batch norm"
    frozen = type(bn) is nn.BatchNorm2d and not bn.training and bn.affine and bn.track_running_stats
    return None if frozen else "batch norm takes the batch's statistics"


def folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Kernel and bias of a convolution with the batch norm's running statistics in them, where it has one.

    Shape: -> (M, 1, k, k), (M,) or None.
    """
    if not hasattr(norm, "bn"):
        return conv.weight, conv.bias
    factor, offset = norm.affine()
    weight = conv.weight * factor.view(-1, *[1] * (conv.weight.ndim - 1))
    return weight, offset if conv.bias is None else conv.bias * factor + offset


def one_pass_refuses(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> str | None:
    """Why Triton does not do convolution, norm and SiLU in one pass, without a gradient, or None."""
    if torch.is_grad_enabled():
        return "gradients are on"
    return triton_refuses(x) or triton_size_refuses(conv) or affine_refuses(norm, act)


def triton_size_refuses(conv: nn.Module) -> str | None:
    """Why Triton's kernels do not do this convolution, or None."""
    if why := geometry_refuses(conv):
        return why
    return None if conv.kernel_size[0] in TRITON_SIZES else f"kernels are for sizes {TRITON_SIZES} only"


def _one_pass(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> Tensor:
    from d_emo.kernels.gpu import local

    return local.depthwise_silu(lowered(x)[0], *folded(conv, norm))


def _onednn_refuses(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.compiler.is_compiling():
        return "the compiler joins small steps itself"
    return geometry_refuses(conv, strided=True) or affine_refuses(norm, act) or onednn_refuses(x, conv.weight)


def _onednn(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> Tensor:
    weight, bias = folded(conv, norm)
    y = torch.ops.mkldnn._convolution_pointwise(
        x.permute(0, 3, 1, 2), weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups, "swish", [], ""
    )
    return y.permute(0, 2, 3, 1)


def _triton_refuses(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> str | None:
    if why := triton_refuses(x) or triton_size_refuses(conv):
        return why
    return None if conv.bias is None else "the convolution has a bias"


def _triton(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> Tensor:
    from d_emo.kernels.gpu import local

    return act(norm(local.depthwise_conv2d(lowered(x)[0], conv.weight)))


def _cpu_refuses(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> str | None:
    if not torch.is_grad_enabled():
        return "gradients are off"
    if x.device.type != "cpu":
        return "not on a CPU"
    if why := geometry_refuses(conv):
        return why
    return None if conv.bias is None else "the convolution has a bias"


def _cpu(x: Tensor, conv: nn.Conv2d, norm: nn.Module, act: nn.Module) -> Tensor:
    return act(norm(_DepthwiseConv2d.apply(*lowered(x.permute(0, 3, 1, 2), conv.weight)).permute(0, 2, 3, 1)))


def _modules(x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> Tensor:
    return act(norm(channels_last(conv(channels_first(x)))))  # views


LOCAL_CONV = (
    Form("Triton, one pass", _one_pass, one_pass_refuses),
    Form("oneDNN, one pass", _onednn, _onednn_refuses),
    Form("Triton's convolution", _triton, _triton_refuses),
    Form("CPU's own gradients", _cpu, _cpu_refuses),
    Form("the modules", _modules),
)
