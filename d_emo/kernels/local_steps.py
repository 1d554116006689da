"""The wide maps of the local branch in training on a CPU: those of its result, and their gradients.

    c = DWConv(a),  y = a + SiLU(BN(c)), with the statistics of the batch

Either in steps of the library, some rows at a time where they allow it, or in C, some channels of an image at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels import native
from d_emo.kernels.depthwise import depthwise_gradients
from d_emo.kernels.dispatch import Form

CHUNK = 2**18
"""Elements of a map that steps follow each other on: 1 MB in float32."""

Running = tuple[Tensor, Tensor, float]
"""A batch norm's running mean, running variance, and momentum."""


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


def _steps_in_rows(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, eps: float, running: Running | None = None
) -> tuple[Tensor, ...]:
    """y, c, and mean and variance of c. Shape: a (B, H, W, M) -> as a, as a, (M,), (M,)."""
    c = F.conv2d(_channels_first(a), kernel, padding=kernel.shape[-1] // 2, groups=len(kernel))
    mean, var = torch.batch_norm_update_stats(c, *running or (torch.zeros_like(gamma), torch.ones_like(gamma), 0.0))
    y, c = torch.empty_like(a), _channels_last(c)
    for some, convolved, out in _rows(a, c, y):
        normed = _normed(convolved, (mean, var, gamma, beta, eps))
        torch.add(some, F.silu(normed, inplace=True), out=out)
    return y, c, mean, var


def _gradients_in_rows(
    grad_y: Tensor, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, c: Tensor, mean: Tensor, var: Tensor,
    eps: float, needs_kernel: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """y, and the gradients of a, the kernel, gamma and beta. Shape: grad_y (B, H, W, M); gradients as their tensors."""
    y, inner = torch.empty_like(a), torch.empty_like(a)
    for some, convolved, outer, out, grad_out in _rows(a, c, grad_y, y, inner):
        normed = _normed(convolved, (mean, var, gamma, beta, eps))
        torch.ops.aten.silu_backward.grad_input(outer, normed, grad_input=grad_out)
        torch.add(some, F.silu(normed, inplace=True), out=out)
    grad_c, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
        _channels_first(inner), _channels_first(c), gamma, None, None, mean, torch.rsqrt(var + eps), True, eps,
        [True] * 3,
    )  # fmt: skip
    del inner
    grad_a, grad_kernel = depthwise_gradients(_channels_first(a), grad_c, kernel, (True, needs_kernel))
    grad_a = _channels_last(grad_a).contiguous()
    grad_a += grad_y
    return y, grad_a, grad_kernel, grad_gamma, grad_beta


def _steps_native(
    a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, eps: float, running: Running | None = None
) -> tuple[Tensor, ...]:
    """As `_steps_in_rows`, with batch norm's sums taken of each image and joined by the law of total variance."""
    y, c, size = torch.empty_like(a), torch.empty_like(a), kernel.shape[-1]
    sums = gamma.new_empty(len(a), 2, len(gamma))
    native.local_step("convolve", size, a=a, c=c, kernel=_taps(kernel), sums=sums)
    pixels, (means, squares) = a[..., 0].numel(), sums.unbind(1)
    mean = means.mean(0)
    var = squares.sum(0) / pixels + (means - mean).square().mean(0)
    native.local_step("skip", size, a=a, given=c, y=y, mean=mean, factor=gamma * torch.rsqrt(var + eps), beta=beta)
    if running is not None:
        running[0].lerp_(mean, running[2])
        running[1].lerp_(var * (pixels / (pixels - 1)), running[2])
    return y, c, mean, var


def _gradients_native(
    grad_y: Tensor, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, c: Tensor, mean: Tensor, var: Tensor,
    eps: float, needs_kernel: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """As `_gradients_in_rows`, with the gradient of c never written down."""
    y, grad_a, size, scale = torch.empty_like(a), torch.empty_like(a), kernel.shape[-1], torch.rsqrt(var + eps)
    maps = {"a": a, "given": c, "grad": grad_y.contiguous(), "mean": mean, "factor": gamma * scale, "beta": beta}
    sums, taps = gamma.new_empty(len(a), 2, len(gamma)), gamma.new_empty(len(a), size * size, len(gamma))
    native.local_step("skip_back", size, y=y, sums=sums, **maps)
    grad_beta, grad_gamma = sums.sum(0)
    grad_gamma = grad_gamma * scale
    share = -maps["factor"] / a[..., 0].numel()
    native.local_step(
        "convolve_back", size, grad_a=grad_a, kernel=_taps(kernel), sums=taps, u=share * grad_beta,
        v=share * grad_gamma * scale, **maps,
    )  # fmt: skip
    grad_kernel = taps.sum(0).t().contiguous().view(kernel.shape).to(kernel.dtype) if needs_kernel else None
    return y, grad_a, grad_kernel, grad_gamma, grad_beta


def _taps(kernel: Tensor) -> Tensor:
    """Shape: (M, 1, k, k) -> (k k, M) in float32."""
    return kernel.float().flatten(1).t().contiguous()


def _native_refuses(kernel: Tensor, *maps: Tensor) -> str | None:
    if why := native.refuses(*maps):
        return why
    if kernel.shape[-1] not in (3, 5, 7):
        return "kernels are for sizes 3, 5 and 7 only"
    if maps[0].shape[-1] % native.lanes():
        return f"{maps[0].shape[-1]} channels are no multiple of {native.lanes()}"
    return None if all(one.is_contiguous() for one in maps) else "a map that is not contiguous"


def _native_steps_refuses(a: Tensor, kernel: Tensor, *_: Any) -> str | None:
    return _native_refuses(kernel, a)


def _native_gradients_refuses(
    grad_y: Tensor, a: Tensor, kernel: Tensor, gamma: Tensor, beta: Tensor, c: Tensor, *_: Any
) -> str | None:
    return _native_refuses(kernel, a, c, grad_y)


STEPS_IN_ROWS = Form("in rows", _steps_in_rows, rival=True)
STEPS_IN_C = Form("C, some channels at a time", _steps_native, _native_steps_refuses, rival=True)
LOCAL_STEPS = STEPS_IN_ROWS, STEPS_IN_C, STEPS_IN_ROWS  # the last of a table has to take everything

GRADIENTS_IN_ROWS = Form("in rows", _gradients_in_rows, rival=True)
GRADIENTS_IN_C = Form("C, some channels at a time", _gradients_native, _native_gradients_refuses, rival=True)
LOCAL_GRADIENTS = GRADIENTS_IN_ROWS, GRADIENTS_IN_C, GRADIENTS_IN_ROWS
