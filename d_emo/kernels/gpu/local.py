"""The local branch of a block on an NVIDIA GPU, as operators of the library, so that the compiler keeps one graph.

    c = DWConv(a),  y = a + SiLU(BN(c)),  out = Wo y

The traffic of the wide maps a, c and y with the GPU's memory is what takes the time. Training keeps a and c only, and
moves 20 wide maps, both directions and the projection included; step by step it is 28.

    forward   convolve        reads a             writes c, and its mean and variance from the same pass
              skip            reads a, c          writes y
              product         reads y
    backward  product                             writes dy
              skip_backward   reads dy, a, c      writes y, dn, and the sums that the norm's gradients are made of
              product         reads y
              correlate       reads a, dn, c      writes dc over dn, and the kernel's gradient
              convolve        reads dc, dy        writes da = dy + the convolution's, over dy

Mean and variance are inside of the operator, not outputs with gradients of their own: autograd would add up the two
gradients of a in a pass of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.gpu.convolution import convolve, taps_of
from d_emo.kernels.gpu.correlation import correlate
from d_emo.kernels.gpu.skip import skip, skip_backward


def _norm(statistics: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Mean, factor and offset of a batch norm. Shape: (2, M), (M,), (M,) -> (3, M), float32."""
    mean, var = statistics
    return torch.stack([mean, gamma.float() * torch.rsqrt(var + eps), beta.float()])


@torch.library.custom_op("d_emo::local_projection", mutates_args=())
def _local_projection(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, c, and mean and variance of c."""
    a = a.contiguous()
    c, statistics = convolve(a, taps_of(kernel), statistics=True)
    y = skip(a, c, _norm(statistics, gamma, beta, eps))
    with torch.autocast(a.device.type, enabled=False):
        return F.linear(y, projection.to(a.dtype)), c, statistics


@_local_projection.register_fake
def _(a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, ...]:
    out = a.new_empty((*a.shape[:-1], len(projection)))
    return out, a.new_empty(a.shape), a.new_empty((2, a.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("d_emo::local_projection_backward", mutates_args=())
def _local_projection_backward(
    grad: Tensor, a: Tensor, c: Tensor, statistics: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor,
    projection: Tensor, eps: float, needs_projection: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the first five arguments of the forward operator; that of the projection is empty if unneeded.

    With the sums s1 of dn and s2 of ``dn (c - mean)`` over N pixels, a batch norm's gradient is
    ``dc = factor (dn - s1 / N - (c - mean) s2 / (var + eps) / N)``, here as ``p dn + q c + t`` for each channel.
    """
    (grad, a, c), pixels = (x.contiguous() for x in (grad, a, c)), a.numel() // a.shape[-1]
    norm = _norm(statistics, gamma, beta, eps)
    mean, factor, _ = norm
    inverse = 1.0 / (statistics[1] + eps)
    with torch.autocast(a.device.type, enabled=False):
        grad_y = grad @ projection.to(a.dtype)  # (B, H, W, M)
        y, inner, (plain, weighted) = skip_backward(grad_y, a, c, norm)
        grad_projection = grad.new_empty(0)
        if needs_projection:
            grad_projection = grad.flatten(0, -2).t() @ y.flatten(0, -2)  # (C, M)
    del y
    q = -factor * inverse * weighted / pixels
    coefficients = torch.stack([factor, q, -factor * plain / pixels - q * mean])
    grad_kernel = correlate(a, inner, kernel.shape[-1], c=c, norm=coefficients)
    convolve(inner, taps_of(kernel), flip=True, plus=grad_y, out=grad_y)
    grad_gamma = (weighted * inverse.sqrt()).to(gamma.dtype)
    others = grad_kernel.to(kernel.dtype), grad_gamma, plain.to(beta.dtype), grad_projection.to(projection.dtype)
    return grad_y, *others


@_local_projection_backward.register_fake
def _(
    grad: Tensor, a: Tensor, c: Tensor, statistics: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor,
    projection: Tensor, eps: float, needs_projection: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = projection.new_empty(projection.shape if needs_projection else 0)
    return a.new_empty(a.shape), kernel.new_empty(kernel.shape), torch.empty_like(gamma), torch.empty_like(beta), like


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, *parameters, ctx.eps = inputs
    ctx.set_materialize_grads(False)  # of c and the statistics, which nobody asks for
    ctx.save_for_backward(a, *output[1:], *parameters)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    needs = ctx.needs_input_grad[4]
    *grads, last = torch.ops.d_emo.local_projection_backward(grad, *ctx.saved_tensors, ctx.eps, needs)
    return *grads, last if needs else None, None


_local_projection.register_autograd(_gradients, setup_context=_keep)


def local_projection(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``Wo (a + SiLU(BN(DWConv(a))))`` with batch norm in training mode, and mean and biased variance of DWConv(a).

    Shape: a (B, H, W, M), kernel (M, 1, k, k), gamma and beta (M,), projection (C, M) -> (B, H, W, C), (M,), (M,).
    """
    out, _, statistics = torch.ops.d_emo.local_projection(a, kernel, gamma, beta, projection, eps)
    return out, *statistics.detach()


@torch.library.custom_op("d_emo::depthwise_conv2d", mutates_args=())
def _depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    return convolve(x.contiguous(), taps_of(weight))[0]


@_depthwise_conv2d.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("d_emo::depthwise_conv2d_backward", mutates_args=())
def _depthwise_conv2d_backward(x: Tensor, grad: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """The gradients of the map and the kernel; empty if unneeded."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = convolve(grad, taps_of(weight), flip=True)[0] if needs[0] else x.new_empty(0)
    grad_weight = correlate(x, grad, weight.shape[-1]).to(weight.dtype) if needs[1] else weight.new_empty(0)
    return grad_x, grad_weight


@_depthwise_conv2d_backward.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[1] else 0)


def _depthwise_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads = torch.ops.d_emo.depthwise_conv2d_backward(x, grad, weight, needs)
    return tuple(one if needed else None for one, needed in zip(grads, needs, strict=True))


_depthwise_conv2d.register_autograd(
    _depthwise_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@torch.library.custom_op("d_emo::depthwise_silu", mutates_args=())
def _depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None, skip: bool) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.float()
    return convolve(x, taps_of(weight), bias=bias, act=True, plus=x if skip else None)[0]


@_depthwise_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, skip: bool) -> Tensor:
    return x.new_empty(x.shape)


def depthwise_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of stride 1 that keeps the size. Shape: (B, H, W, M), (M, 1, k, k) -> (B, H, W, M)."""
    return torch.ops.d_emo.depthwise_conv2d(x, weight)


def depthwise_silu(x: Tensor, weight: Tensor, bias: Tensor | None, *, skip: bool = False) -> Tensor:
    """``SiLU(DWConv(x) + bias)``, with ``skip`` plus ``x``; without a gradient.

    Shape: x (B, H, W, M), weight (M, 1, k, k), bias (M,) -> (B, H, W, M).
    """
    return torch.ops.d_emo.depthwise_silu(x, weight, bias, skip)


def check(device: torch.device) -> None:
    """Try each operator, forward and backward, on small random maps against the library's steps in float64.

    Raises:
        RuntimeError: A result differs.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype, size, tolerance in (
        (torch.float32, 3, 5e-3), (torch.bfloat16, 5, 3e-2), (torch.float16, 7, 1e-2)  # float32 may be TF32
    ):  # fmt: skip
        shapes = (2, 5, 19, 70), (70, 1, size, size), (70,), (70,), (10, 70)
        cpu = {"generator": generator, "device": "cpu", "dtype": torch.float32}
        x, *weights = (torch.randn(shape, **cpu).to(device).requires_grad_() for shape in shapes)
        for name, ours, theirs, number in TRIALS:
            inputs = [(x + 1).detach().to(dtype).requires_grad_(), *weights[:number]]
            exact = [one.detach().double().requires_grad_() for one in inputs]
            for got, expected in zip(_trial(ours, inputs), _trial(theirs, exact), strict=True):
                error = (got.double() - expected).norm() / expected.norm()
                if not error <= tolerance:  # nor may it be NaN
                    raise RuntimeError(f"{name} of size {size} in {dtype} is off by {error:.1e} on {device}.")


def _trial(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The result and, if it has any, its gradients, for a gradient of the result that looks random."""
    out = function(*inputs)
    if not out.requires_grad:
        return [out]
    grad = torch.arange(out.numel(), dtype=torch.float64, device=out.device).square().sin()
    return [out, *torch.autograd.grad(out, inputs, grad.view(out.shape).to(out.dtype))]


def _plain_conv(x: Tensor, weight: Tensor) -> Tensor:
    padding, groups = weight.shape[-1] // 2, len(weight)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=groups).permute(0, 2, 3, 1)


def _branch(a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor) -> Tensor:
    return local_projection(a, kernel, gamma, beta, projection, eps=1e-6)[0]


def _plain_branch(a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor) -> Tensor:
    c = _plain_conv(a, kernel)
    var, mean = torch.var_mean(c, (0, 1, 2), correction=0)
    return F.linear(a + F.silu((c - mean) * torch.rsqrt(var + 1e-6) * gamma + beta), projection)


@torch.no_grad()
def _inference(a: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return depthwise_silu(a, kernel, bias, skip=True)


@torch.no_grad()
def _plain_inference(a: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return a + F.silu(_plain_conv(a, kernel) + bias)


TRIALS = (
    ("the depthwise convolution", depthwise_conv2d, _plain_conv, 1),
    ("the local branch", _branch, _plain_branch, 4),
    ("the local branch in inference", _inference, _plain_inference, 2),
)
"""Name, operator, plain form, and how many weights they take."""
