"""Triton kernels of a block's inner skip, ``y = a + SiLU(n)`` with ``n = (c - mean) factor + offset``.

They move bytes and compute little. So each thread loads 16 bytes at a time (8 channels in bfloat16), several of them
before the first is used: 4 of each map forward, 2 backward, where two sums have to be kept as well.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from d_emo.kernels.gpu.convolution import WARPS, multiprocessors

CHANNELS = 128
"""Of a program."""

PROGRAMS = 15
"""Programs of the backward kernel for each multiprocessor: five rounds of three at a time, its registers' limit."""


@triton.jit
def _norm_of(norm_ptr, channels, known, M: tl.constexpr):
    """Mean, factor and offset."""
    mean = tl.load(norm_ptr + channels, mask=known, other=0.0)
    factor = tl.load(norm_ptr + M + channels, mask=known, other=0.0)
    return mean, factor, tl.load(norm_ptr + 2 * M + channels, mask=known, other=0.0)


@triton.jit(do_not_specialize=["pixels"])
def _skip(a_ptr, c_ptr, norm_ptr, y_ptr, pixels, M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """Some pixels, some channels."""
    BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    channels = pid % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    known = channels < M
    mean, factor, offset = _norm_of(norm_ptr, channels, known, M)
    first = pid // BLOCKS * BLOCK_P
    rows = tl.arange(0, BLOCK_P)[:, None]
    mask = (rows < pixels - first) & known
    tile = rows * M + channels
    start = first.to(tl.int64) * M
    a = tl.load(a_ptr + start + tile, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + start + tile, mask=mask, other=0.0).to(tl.float32)
    n = (c - mean) * factor + offset
    tl.store(y_ptr + start + tile, (a + n / (1.0 + tl.exp(-n))).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "parts"])
def _skip_backward(grad_ptr, a_ptr, c_ptr, norm_ptr, y_ptr, inner_ptr, sums_ptr, pixels, parts, M: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Every so many pixels, some channels: y anew, the gradient of n, and its sums with and without ``c - mean``."""
    BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    part = pid // BLOCKS
    channels = pid % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    known = channels < M
    mean, factor, offset = _norm_of(norm_ptr, channels, known, M)
    rows = tl.arange(0, BLOCK_P)[:, None]
    tile = rows * M + channels
    plain = tl.full((BLOCK_P, BLOCK_M), 0, tl.float32)
    weighted = tl.full((BLOCK_P, BLOCK_M), 0, tl.float32)
    for first in range(part * BLOCK_P, pixels, parts * BLOCK_P):
        mask = (rows < pixels - first) & known
        start = (first + tl.full((), 0, tl.int64)) * M
        grad = tl.load(grad_ptr + start + tile, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + start + tile, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + start + tile, mask=mask, other=0.0).to(tl.float32)
        n = (c - mean) * factor + offset
        gate = 1.0 / (1.0 + tl.exp(-n))
        tl.store(y_ptr + start + tile, (a + n * gate).to(y_ptr.dtype.element_ty), mask=mask)
        inner = grad * gate * (1.0 + n * (1.0 - gate))
        tl.store(inner_ptr + start + tile, inner.to(inner_ptr.dtype.element_ty), mask=mask)
        plain += inner  # zero beside the map, as grad is
        weighted += inner * (c - mean)
    sums_ptr += part * (2 * M) + channels
    tl.store(sums_ptr, tl.sum(plain, axis=0)[None, :], mask=known)
    tl.store(sums_ptr + M, tl.sum(weighted, axis=0)[None, :], mask=known)


def skip(a: Tensor, c: Tensor, norm: Tensor) -> Tensor:
    """``a + SiLU((c - mean) factor + offset)``.

    Shape: a and c (B, H, W, M), norm (3, M) in float32: mean, factor, offset -> (B, H, W, M).
    """
    dim = a.shape[-1]
    pixels, block = a.numel() // dim, 32
    y = torch.empty_like(a)
    with torch.cuda.device_of(a):
        _skip[(triton.cdiv(pixels, block) * triton.cdiv(dim, CHANNELS),)](
            a, c, norm, y, pixels, M=dim, BLOCK_P=block, BLOCK_M=CHANNELS, num_warps=WARPS, enable_fp_fusion=True
        )
    return y


def skip_backward(grad: Tensor, a: Tensor, c: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`skip` again and the gradient of n, with the sums of that gradient over the pixels, alone and times ``c - mean``.

    Shape: grad, a and c (B, H, W, M), norm (3, M) in float32 -> 2 x (B, H, W, M), (2, M) in float32.
    """
    dim = a.shape[-1]
    pixels, block, blocks = a.numel() // dim, 16, triton.cdiv(dim, CHANNELS)
    parts = min(triton.cdiv(pixels, block), max(1, PROGRAMS * multiprocessors(a.device) // blocks))
    y, inner, sums = torch.empty_like(a), torch.empty_like(a), a.new_empty((parts, 2, dim), dtype=torch.float32)
    with torch.cuda.device_of(a):
        _skip_backward[(parts * blocks,)](
            grad, a, c, norm, y, inner, sums, pixels, parts, M=dim, BLOCK_P=block, BLOCK_M=CHANNELS, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return y, inner, sums.sum(0)
