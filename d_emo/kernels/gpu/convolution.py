"""Triton kernel of a depthwise convolution of stride 1 that keeps the size, with batch statistics of its result.

Maps are (B, H, W, M), contiguous. A program has a strip of columns and some channels, and walks down the rows of an
image. So a row is loaded once for each column of the kernel, k times, where a program that makes its outputs one by one
loads it k k times; and all loads of a row but the first come from the multiprocessor's own cache.

Each thread keeps all k k taps of its `CHANNELS_EACH` channels in registers, for some columns. The widest loads, of 8
channels in bfloat16, would need 200 registers for the taps (k = 5); taps loaded anew for each row would take more of
the cache's bandwidth than the map does.

Sums are float32. Weights are (k k, M), float32; see `taps_of`. Triton 3.2 knows no tuples: hence the many names.
"""

# ruff: noqa: N803

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS_EACH = 2
"""Channels of a thread. The 32 threads of a warp then read 128 bytes of a bfloat16 map, a line of the cache."""

CHANNELS = 64
"""Channels of a program: those of one warp. The warps share out the columns."""

WARPS = 4


@triton.jit
def _tap_row(w_ptr, row, channels, known, M: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr):
    """A row of the kernel: seven tensors, of which the first K count."""
    start, step = row * K * M, M
    if FLIP:
        start, step = (K * K - 1 - row * K) * M, -M
    w_ptr += start + channels
    w0 = tl.load(w_ptr, mask=known, other=0.0)
    w1 = tl.load(w_ptr + step, mask=known, other=0.0)
    w2 = tl.load(w_ptr + 2 * step, mask=known, other=0.0)
    w3, w4, w5, w6 = w0, w0, w0, w0
    if K > 3:
        w3 = tl.load(w_ptr + 3 * step, mask=known, other=0.0)
        w4 = tl.load(w_ptr + 4 * step, mask=known, other=0.0)
    if K > 5:
        w5 = tl.load(w_ptr + 5 * step, mask=known, other=0.0)
        w6 = tl.load(w_ptr + 6 * step, mask=known, other=0.0)
    return w0, w1, w2, w3, w4, w5, w6


@triton.jit
def _add_row(total, x0, x1, x2, x3, x4, x5, x6, w0, w1, w2, w3, w4, w5, w6, K: tl.constexpr):
    """``total`` plus the products of a row of the map with a row of the kernel."""
    total += x0 * w0
    total += x1 * w1
    total += x2 * w2
    if K > 3:
        total += x3 * w3
        total += x4 * w4
    if K > 5:
        total += x5 * w5
        total += x6 * w6
    return total


@triton.jit
def _load_row(x_ptr, row, height, tile, mask, ROW: tl.constexpr):
    """A row's tile, zero beside the map; below the map it is that of the last row, which the caller must not use."""
    return tl.load(x_ptr + tl.minimum(row, height - 1) * ROW + tile, mask=mask, other=0.0)


@triton.jit
def _column(row_ptr, middle, columns, channels, known, J: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
            K: tl.constexpr):  # fmt: skip
    """The tile that column J of the kernel meets, in float32; the one in the middle is there already."""
    x = middle
    if J < K and J != K // 2:
        reached = columns + (J - K // 2)
        mask = (reached >= 0) & (reached < WIDTH) & known
        x = tl.load(row_ptr + (reached * M + channels), mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store_row(total, row, out_ptr, plus_ptr, bias, tile, mask, mean, m2, ROW: tl.constexpr, PLUS: tl.constexpr,
               ACT: tl.constexpr, STATISTICS: tl.constexpr):  # fmt: skip
    """Finish a row of the output; returns the mean of each column so far, and its squared distances from it summed."""
    if ACT:
        total += bias
        total = total / (1.0 + tl.exp(-total))
    if PLUS:
        total += tl.load(plus_ptr + row * ROW + tile, mask=mask, other=0.0).to(tl.float32)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * ROW + tile, out, mask=mask)
    if STATISTICS:
        distance = out.to(tl.float32) - mean
        mean += distance * (1.0 / (row + 1))
        m2 += distance * (out.to(tl.float32) - mean)
    return mean, m2


@triton.jit(do_not_specialize=["height"])
def _convolve(x_ptr, w_ptr, bias_ptr, plus_ptr, out_ptr, mean_ptr, m2_ptr, height, WIDTH: tl.constexpr, M: tl.constexpr,
              K: tl.constexpr, FLIP: tl.constexpr, PLUS: tl.constexpr, ACT: tl.constexpr, STATISTICS: tl.constexpr,
              BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    """A strip of an image, all rows, for some channels; see `convolve`.

    The totals of the k - 1 rows under way are kept, a0 of the uppermost. A row of the map that comes completes a0's row
    and takes part in k - 1 others. The tile in the middle is loaded one row ahead, which brings the row to the cache.
    """
    HALF: tl.constexpr = K // 2
    ROW: tl.constexpr = WIDTH * M
    STRIPS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    part = pid // BLOCKS
    strip = part % STRIPS
    image = (part // STRIPS) * (height.to(tl.int64) * ROW)
    channels = (pid % BLOCKS) * BLOCK_M + tl.max_contiguous(tl.arange(0, BLOCK_M), EACH)[None, :]
    order = tl.arange(0, BLOCK_W)[:, None]  # Triton deals these out to the four warps in turns
    columns = strip * BLOCK_W + order % 4 * (BLOCK_W // 4) + order // 4  # so each warp's are neighbours
    known = channels < M
    tile = columns * M + channels
    mask = (columns < WIDTH) & known
    x_ptr += image
    out_ptr += image
    plus_ptr += image

    v00, v01, v02, v03, v04, v05, v06 = _tap_row(w_ptr, K - 1, channels, known, M, K, FLIP)
    v10, v11, v12, v13, v14, v15, v16 = _tap_row(w_ptr, K - 2, channels, known, M, K, FLIP)
    v20, v21, v22, v23, v24, v25, v26 = _tap_row(w_ptr, K - 3, channels, known, M, K, FLIP)
    if K > 3:
        v30, v31, v32, v33, v34, v35, v36 = _tap_row(w_ptr, K - 4, channels, known, M, K, FLIP)
        v40, v41, v42, v43, v44, v45, v46 = _tap_row(w_ptr, K - 5, channels, known, M, K, FLIP)
    if K > 5:
        v50, v51, v52, v53, v54, v55, v56 = _tap_row(w_ptr, K - 6, channels, known, M, K, FLIP)
        v60, v61, v62, v63, v64, v65, v66 = _tap_row(w_ptr, K - 7, channels, known, M, K, FLIP)
    bias = tl.load(bias_ptr + channels, mask=known, other=0.0)

    zero = tl.full((BLOCK_W, BLOCK_M), 0, tl.float32)
    a0, a1, a2, a3, a4, a5 = zero, zero, zero, zero, zero, zero
    mean, m2 = zero, zero
    ahead = _load_row(x_ptr, 0, height, tile, mask, ROW)
    for r in range(0, height):
        row_ptr = x_ptr + r * ROW
        middle = ahead
        ahead = _load_row(x_ptr, r + 1, height, tile, mask, ROW)
        x0 = _column(row_ptr, middle, columns, channels, known, 0, WIDTH, M, K)
        x1 = _column(row_ptr, middle, columns, channels, known, 1, WIDTH, M, K)
        x2 = _column(row_ptr, middle, columns, channels, known, 2, WIDTH, M, K)
        x3 = _column(row_ptr, middle, columns, channels, known, 3, WIDTH, M, K)
        x4 = _column(row_ptr, middle, columns, channels, known, 4, WIDTH, M, K)
        x5 = _column(row_ptr, middle, columns, channels, known, 5, WIDTH, M, K)
        x6 = _column(row_ptr, middle, columns, channels, known, 6, WIDTH, M, K)
        done = _add_row(a0, x0, x1, x2, x3, x4, x5, x6, v00, v01, v02, v03, v04, v05, v06, K)
        a0 = _add_row(a1, x0, x1, x2, x3, x4, x5, x6, v10, v11, v12, v13, v14, v15, v16, K)
        a1 = _add_row(a2, x0, x1, x2, x3, x4, x5, x6, v20, v21, v22, v23, v24, v25, v26, K)
        if K > 3:
            a2 = _add_row(a3, x0, x1, x2, x3, x4, x5, x6, v30, v31, v32, v33, v34, v35, v36, K)
            a3 = _add_row(a4, x0, x1, x2, x3, x4, x5, x6, v40, v41, v42, v43, v44, v45, v46, K)
        if K > 5:
            a4 = _add_row(a5, x0, x1, x2, x3, x4, x5, x6, v50, v51, v52, v53, v54, v55, v56, K)
            a5 = _add_row(zero, x0, x1, x2, x3, x4, x5, x6, v60, v61, v62, v63, v64, v65, v66, K)
        if r >= HALF:
            mean, m2 = _store_row(
                done, r - HALF, out_ptr, plus_ptr, bias, tile, mask, mean, m2, ROW, PLUS, ACT, STATISTICS
            )
    # What lies below the map is zero, so the rows still under way are complete.
    for i in tl.static_range(HALF):
        left = a0 if i == 0 else (a1 if i == 1 else a2)
        if height - HALF + i >= 0:
            mean, m2 = _store_row(
                left, height - HALF + i, out_ptr, plus_ptr, bias, tile, mask, mean, m2, ROW, PLUS, ACT, STATISTICS
            )
    if STATISTICS:
        count = tl.minimum(WIDTH - strip * BLOCK_W, BLOCK_W)
        average = tl.sum(tl.where(mask, mean, 0.0), axis=0)[None, :] / count
        distance = tl.where(mask, mean - average, 0.0)
        spread = tl.sum(tl.where(mask, m2, 0.0) + height * distance * distance, axis=0)[None, :]
        tl.store(mean_ptr + part * M + channels, average, mask=known)
        tl.store(m2_ptr + part * M + channels, spread, mask=known)


@triton.jit(do_not_specialize=["parts", "height"])
def _merge(mean_ptr, m2_ptr, out_ptr, parts, height, WIDTH: tl.constexpr, M: tl.constexpr, BLOCK_W: tl.constexpr,
           BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Mean and biased variance of the whole from those of the parts: the mean first, then the distances from it."""
    STRIPS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    channels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    known = channels < M
    pixels = (parts // STRIPS * height * WIDTH).to(tl.float32)
    total = tl.full((BLOCK_P, BLOCK_M), 0, tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        share = tl.minimum(WIDTH - part % STRIPS * BLOCK_W, BLOCK_W) * height / pixels
        total += share * tl.load(mean_ptr + part * M + channels, mask=(part < parts) & known, other=0.0)
    mean = tl.sum(total, axis=0)[None, :]
    total = tl.full((BLOCK_P, BLOCK_M), 0, tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)[:, None]
        there = (part < parts) & known
        share = tl.minimum(WIDTH - part % STRIPS * BLOCK_W, BLOCK_W) * height / pixels
        distance = tl.where(there, tl.load(mean_ptr + part * M + channels, mask=there, other=0.0) - mean, 0.0)
        total += tl.load(m2_ptr + part * M + channels, mask=there, other=0.0) / pixels + share * distance * distance
    tl.store(out_ptr + channels, mean, mask=known)
    tl.store(out_ptr + M + channels, tl.sum(total, axis=0)[None, :], mask=known)


def taps_of(weight: Tensor) -> Tensor:
    """The taps of a kernel, side by side for all channels. Shape: (M, 1, k, k) -> (k k, M), float32."""
    return weight.detach().reshape(len(weight), -1).t().to(torch.float32).contiguous()


def strip_width(width: int) -> int:
    """Columns of a program: 4 to 16, so that each of 4 warps has 1 to 4."""
    return min(16, max(WARPS, triton.next_power_of_2(width)))


def convolve(
    x: Tensor, taps: Tensor, *, flip: bool = False, bias: Tensor | None = None, act: bool = False,
    plus: Tensor | None = None, out: Tensor | None = None, statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``DWConv(x)``, or ``SiLU(DWConv(x) + bias)``; then ``+ plus``.

    Args:
        x: the map.
        taps: of the kernel, as `taps_of` gives them.
        flip: take the taps in reverse order, which is the gradient's convolution.
        bias: before the activation; only with ``act``.
        act: whether to apply SiLU.
        plus: a map to be added at the end.
        out: where to put the result; may be ``plus``, not ``x``.
        statistics: whether to return mean and biased variance of the result, too.

    Shape: x, plus and out (B, H, W, M), taps (k k, M), bias (M,) -> (B, H, W, M), (2, M) in float32 or None.
    """
    batch, height, width, dim = x.shape
    block = strip_width(width)
    parts = batch * triton.cdiv(width, block)
    out = torch.empty_like(x) if out is None else out
    shares = x.new_empty((2, parts, dim), dtype=torch.float32) if statistics else taps[None].expand(2, -1, -1)
    if act and bias is None:
        bias = taps.new_zeros(dim)
    with torch.cuda.device_of(x):
        _convolve[(parts * triton.cdiv(dim, CHANNELS),)](
            x, taps, taps if bias is None else bias, x if plus is None else plus, out, *shares, height, WIDTH=width,
            M=dim, K=math.isqrt(len(taps)), FLIP=flip, PLUS=plus is not None, ACT=act, STATISTICS=statistics,
            BLOCK_W=block, BLOCK_M=CHANNELS, EACH=CHANNELS_EACH, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        if not statistics:
            return out, None
        whole = x.new_empty((2, dim), dtype=torch.float32)
        _merge[(triton.cdiv(dim, 16),)](
            *shares, whole, parts, height, WIDTH=width, M=dim, BLOCK_W=block, BLOCK_P=128, BLOCK_M=16, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out, whole


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where Triton's interpreter stands in for it."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
