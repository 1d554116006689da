"""The local branch of a block, with its skip; in training with the projection after it.

    c = DWConv(a),  y = a + SiLU(BN(c)),  out = Wo y

Step by step, a network keeps the wide maps a, c, BN(c) and y for its backward pass. Here it keeps a and c. The backward
pass makes the other two anew; on a CPU some rows at a time, so that they stay in the cache between the steps, and on a
GPU as `d_emo.kernels.gpu.local` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.choice import is_plain, lowered, uses_triton
from d_emo.kernels.depthwise import convolves_on_gpu, depthwise_gradients
from d_emo.kernels.linear import multiply

CHUNK = 2**18
"""Elements of a map that steps follow each other on: 1 MB in float32."""


PARAMETERS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}
"""The precision of the parameters that goes with that of the map; bfloat16 is autocast's."""


def fuses_training(a: Tensor, *parameters: Tensor) -> bool:
    """Whether `local_projection` takes this map and these parameters, in its order; else the plain steps are wanted."""
    if torch.is_grad_enabled() and uses_triton(a, *parameters):
        return a.numel() > a.shape[-1] and all(convolves_on_gpu(a, kernel.shape[-1]) for kernel in parameters[:1])
    if is_plain() or not torch.is_grad_enabled() or any(x.device.type != "cpu" for x in (a, *parameters)):
        return False
    precision = PARAMETERS.get(lowered(a)[0].dtype)
    if precision is None or any(x.dtype != precision for x in parameters):
        return False
    return a.numel() > a.shape[-1]  # one value per channel has no variance; the library refuses it in its own words


def local_projection(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, *, running_mean: Tensor,
    running_var: Tensor, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    """``Wo (a + SiLU(BN(DWConv(a))))`` with batch norm in training mode; only where `fuses_training`.

    Args:
        a: the map.
        kernel: of the depthwise convolution, which has stride 1 and keeps the size.
        gamma, beta: factor and offset of batch norm.
        projection: the matrix Wo.
        running_mean, running_var: batch norm's statistics for inference, updated in place.
        momentum, eps: of batch norm.

    Shape: a (B, H, W, M), kernel (M, 1, k, k), gamma and beta (M,), projection (C, M) -> (B, H, W, C).
    """
    if uses_triton(a):
        from d_emo.kernels.gpu import local

        statistics = {"running_mean": running_mean, "running_var": running_var, "momentum": momentum, "eps": eps}
        return local.local_projection(lowered(a)[0], kernel, gamma, beta, projection, **statistics)
    a, kernel, projection = lowered(a, kernel, projection)
    a = a.contiguous()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        c = F.conv2d(_channels_first(a), kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
        mean, var = torch.batch_norm_update_stats(c, running_mean, running_var, momentum)
    return _LocalProjection.apply(a, kernel, gamma, beta, projection, c, mean, var, eps)


def _channels_first(x: Tensor) -> Tensor:
    """Shape: (B, H, W, M) -> (B, M, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """Shape: (B, M, H, W) -> (B, H, W, M), a view."""
    return x.permute(0, 2, 3, 1)


def _rows(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few pixels of every map, in turns, as views. Shape: each (B, H, W, M) -> tuples of (n, M)."""
    dim = maps[0].shape[-1]
    return zip(*(x.view(-1, dim).split(max(1, CHUNK // dim)) for x in maps), strict=True)


def _normed(rows: Tensor, statistics: tuple[Any, ...]) -> Tensor:
    """BN of some pixels. Shape: (n, M) -> (n, M)."""
    mean, var, gamma, beta, eps = statistics
    image = _channels_first(rows[None, :, None])  # (1, M, n, 1)
    return _channels_last(F.batch_norm(image, mean, var, gamma, beta, eps=eps)).view(rows.shape)


class _LocalProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, projection: Tensor, c: Tensor, mean: Tensor,
        var: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(a, kernel, gamma, beta, projection, c, mean, var)
        ctx.eps, y = eps, torch.empty_like(a)
        with torch.autocast("cpu", enabled=False):
            for some, convolved, out in _rows(a, _channels_last(c), y):
                normed = _normed(convolved, (mean, var, gamma, beta, eps))
                torch.add(some, F.silu(normed, inplace=True), out=out)
            return multiply(y, projection)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, kernel, gamma, beta, projection, c, mean, var = ctx.saved_tensors
        grad_y = multiply(grad, projection.t())  # (B, H, W, M)
        y, inner = torch.empty_like(a), torch.empty_like(a)
        for some, convolved, outer, out, grad_out in _rows(a, _channels_last(c), grad_y, y, inner):
            normed = _normed(convolved, (mean, var, gamma, beta, ctx.eps))
            torch.ops.aten.silu_backward.grad_input(outer, normed, grad_input=grad_out)
            torch.add(some, F.silu(normed, inplace=True), out=out)
        needs, grad_projection = ctx.needs_input_grad, None
        if needs[4]:
            grad_projection = multiply(grad.flatten(0, -2).t(), y.flatten(0, -2).t())  # (C, M)
        del y
        grad_c, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
            _channels_first(inner), c, gamma, None, None, mean, torch.rsqrt(var + ctx.eps), True, ctx.eps, [True] * 3
        )
        del inner
        grad_a, grad_kernel = depthwise_gradients(_channels_first(a), grad_c, kernel, (True, needs[1]))
        grad_y += _channels_last(grad_a)
        return grad_y, grad_kernel, grad_gamma, grad_beta, grad_projection, None, None, None, None


def fuses_skip(a: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether `local_skip` takes this map and this convolution; otherwise the plain steps are wanted."""
    if torch.is_grad_enabled() or (stride, dilation) != ((1, 1), (1, 1)):
        return False
    return convolves_on_gpu(a, weight.shape[-1])


def local_skip(a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``a + SiLU(DWConv(a) + b)`` in one pass over the map, without a gradient; only where `fuses_skip`.

    Shape: a (B, H, W, M), weight (M, 1, k, k), bias (M,) -> (B, H, W, M).
    """
    from d_emo.kernels.gpu import local

    return local.depthwise_silu(lowered(a)[0], weight, bias, skip=True)
