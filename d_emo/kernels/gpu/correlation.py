"""Triton kernel of the gradient of a depthwise kernel: tap by tap the product of the map with that of the output.

A program has some channels and sums strips of columns, one after the other, down their rows. Each thread keeps the sums
of all taps, for each of its columns and channels, in registers: so the larger the kernel, the fewer its columns.
"""

# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from d_emo.kernels.gpu.convolution import CHANNELS, CHANNELS_EACH, WARPS, multiprocessors, strip_width
from d_emo.kernels.gpu.convolution import _column as _column
from d_emo.kernels.gpu.convolution import _load_row as _load_row

COLUMNS = {3: 4, 5: 2, 7: 1}
"""Columns of a thread for each size of the kernel: 72, 100 and 98 registers for the sums."""

PROGRAMS = 6
"""Programs of a summing kernel for each multiprocessor of the GPU: two rounds of three at a time."""


@triton.jit
def _outer(x, d0, d1, d2, d3, d4, d5, d6, t0, t1, t2, t3, t4, t5, t6, K: tl.constexpr):
    """A column of the kernel's gradient, t0 to t6, plus the products of a tile with those of k rows of the gradient."""
    t0 += x * d0
    t1 += x * d1
    t2 += x * d2
    if K > 3:
        t3 += x * d3
        t4 += x * d4
    if K > 5:
        t5 += x * d5
        t6 += x * d6
    return t0, t1, t2, t3, t4, t5, t6


@triton.jit
def _put_column(out_ptr, column, t0, t1, t2, t3, t4, t5, t6, channels, known, M: tl.constexpr, K: tl.constexpr):
    """Store a column of the kernel's gradient, summed over the strip."""
    out_ptr += column * M + channels
    tl.store(out_ptr, tl.sum(t0, axis=0)[None, :], mask=known)
    tl.store(out_ptr + K * M, tl.sum(t1, axis=0)[None, :], mask=known)
    tl.store(out_ptr + 2 * K * M, tl.sum(t2, axis=0)[None, :], mask=known)
    if K > 3:
        tl.store(out_ptr + 3 * K * M, tl.sum(t3, axis=0)[None, :], mask=known)
        tl.store(out_ptr + 4 * K * M, tl.sum(t4, axis=0)[None, :], mask=known)
    if K > 5:
        tl.store(out_ptr + 5 * K * M, tl.sum(t5, axis=0)[None, :], mask=known)
        tl.store(out_ptr + 6 * K * M, tl.sum(t6, axis=0)[None, :], mask=known)


@triton.jit
def _gradient(g, c, g_ptr, row, height, tile, mask, p, q, t, ROW: tl.constexpr, NORM: tl.constexpr):
    """The gradient of the convolution's output, zero outside the map; with NORM it is ``p g + q c + t``, and stored."""
    g = g.to(tl.float32)
    if NORM:
        stored = (p * g + (q * c.to(tl.float32) + t)).to(g_ptr.dtype.element_ty)
        if row < height:
            tl.store(g_ptr + row * ROW + tile, stored, mask=mask)
        g = tl.where(mask, stored.to(tl.float32), 0.0)
    return tl.where(row < height, g, 0.0)


@triton.jit(do_not_specialize=["height", "strips", "parts"])
def _correlate(x_ptr, g_ptr, c_ptr, norm_ptr, out_ptr, height, strips, parts, WIDTH: tl.constexpr, M: tl.constexpr,
               K: tl.constexpr, NORM: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr,
               EACH: tl.constexpr):  # fmt: skip
    """A part's share of the kernel's gradient: some strips, one after the other, for some channels; see `correlate`.

    The k rows of the gradient that meet a row of the map are kept, d0 the lowest.
    """
    HALF: tl.constexpr = K // 2
    ROW: tl.constexpr = WIDTH * M
    STRIPS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    part = pid // BLOCKS
    channels = (pid % BLOCKS) * BLOCK_M + tl.max_contiguous(tl.arange(0, BLOCK_M), EACH)[None, :]
    known = channels < M
    place = tl.arange(0, BLOCK_W)[:, None]
    place = place % 4 * (BLOCK_W // 4) + place // 4  # neighbours to a warp, as in the convolution
    p = tl.load(norm_ptr + channels, mask=known, other=0.0)
    q = tl.load(norm_ptr + M + channels, mask=known, other=0.0)
    t = tl.load(norm_ptr + 2 * M + channels, mask=known, other=0.0)

    zero = tl.full((BLOCK_W, BLOCK_M), 0, tl.float32)
    t00, t01, t02, t03, t04, t05, t06 = zero, zero, zero, zero, zero, zero, zero
    t10, t11, t12, t13, t14, t15, t16 = zero, zero, zero, zero, zero, zero, zero
    t20, t21, t22, t23, t24, t25, t26 = zero, zero, zero, zero, zero, zero, zero
    t30, t31, t32, t33, t34, t35, t36 = zero, zero, zero, zero, zero, zero, zero
    t40, t41, t42, t43, t44, t45, t46 = zero, zero, zero, zero, zero, zero, zero
    t50, t51, t52, t53, t54, t55, t56 = zero, zero, zero, zero, zero, zero, zero
    t60, t61, t62, t63, t64, t65, t66 = zero, zero, zero, zero, zero, zero, zero
    for strip in range(part, strips, parts):
        image = (strip // STRIPS) * (height.to(tl.int64) * ROW)
        columns = (strip % STRIPS) * BLOCK_W + place
        tile = columns * M + channels
        mask = (columns < WIDTH) & known
        xs, gs, cs = x_ptr + image, g_ptr + image, c_ptr + image
        d0, d1, d2, d3, d4, d5, d6 = zero, zero, zero, zero, zero, zero, zero
        for row in tl.static_range(HALF):
            d2, d1 = d1, d0
            g = _load_row(gs, row, height, tile, mask, ROW)
            c = _load_row(cs, row, height, tile, mask, ROW)
            d0 = _gradient(g, c, gs, row, height, tile, mask, p, q, t, ROW, NORM)
        g = _load_row(gs, HALF, height, tile, mask, ROW)
        c = _load_row(cs, HALF, height, tile, mask, ROW)
        ahead = _load_row(xs, 0, height, tile, mask, ROW)
        for r in range(0, height):
            row_ptr = xs + r * ROW
            d6, d5, d4, d3, d2, d1 = d5, d4, d3, d2, d1, d0
            d0 = _gradient(g, c, gs, r + HALF, height, tile, mask, p, q, t, ROW, NORM)
            middle = ahead
            g = _load_row(gs, r + HALF + 1, height, tile, mask, ROW)
            c = _load_row(cs, r + HALF + 1, height, tile, mask, ROW)
            ahead = _load_row(xs, r + 1, height, tile, mask, ROW)
            x = _column(row_ptr, middle, columns, channels, known, 0, WIDTH, M, K)
            t00, t10, t20, t30, t40, t50, t60 = _outer(
                x, d0, d1, d2, d3, d4, d5, d6, t00, t10, t20, t30, t40, t50, t60, K
            )
            x = _column(row_ptr, middle, columns, channels, known, 1, WIDTH, M, K)
            t01, t11, t21, t31, t41, t51, t61 = _outer(
                x, d0, d1, d2, d3, d4, d5, d6, t01, t11, t21, t31, t41, t51, t61, K
            )
            x = _column(row_ptr, middle, columns, channels, known, 2, WIDTH, M, K)
            t02, t12, t22, t32, t42, t52, t62 = _outer(
                x, d0, d1, d2, d3, d4, d5, d6, t02, t12, t22, t32, t42, t52, t62, K
            )
            if K > 3:
                x = _column(row_ptr, middle, columns, channels, known, 3, WIDTH, M, K)
                t03, t13, t23, t33, t43, t53, t63 = _outer(
                    x, d0, d1, d2, d3, d4, d5, d6, t03, t13, t23, t33, t43, t53, t63, K
                )
                x = _column(row_ptr, middle, columns, channels, known, 4, WIDTH, M, K)
                t04, t14, t24, t34, t44, t54, t64 = _outer(
                    x, d0, d1, d2, d3, d4, d5, d6, t04, t14, t24, t34, t44, t54, t64, K
                )
            if K > 5:
                x = _column(row_ptr, middle, columns, channels, known, 5, WIDTH, M, K)
                t05, t15, t25, t35, t45, t55, t65 = _outer(
                    x, d0, d1, d2, d3, d4, d5, d6, t05, t15, t25, t35, t45, t55, t65, K
                )
                x = _column(row_ptr, middle, columns, channels, known, 6, WIDTH, M, K)
                t06, t16, t26, t36, t46, t56, t66 = _outer(
                    x, d0, d1, d2, d3, d4, d5, d6, t06, t16, t26, t36, t46, t56, t66, K
                )
    out_ptr += part * (K * K * M)
    _put_column(out_ptr, 0, t00, t10, t20, t30, t40, t50, t60, channels, known, M, K)
    _put_column(out_ptr, 1, t01, t11, t21, t31, t41, t51, t61, channels, known, M, K)
    _put_column(out_ptr, 2, t02, t12, t22, t32, t42, t52, t62, channels, known, M, K)
    if K > 3:
        _put_column(out_ptr, 3, t03, t13, t23, t33, t43, t53, t63, channels, known, M, K)
        _put_column(out_ptr, 4, t04, t14, t24, t34, t44, t54, t64, channels, known, M, K)
    if K > 5:
        _put_column(out_ptr, 5, t05, t15, t25, t35, t45, t55, t65, channels, known, M, K)
        _put_column(out_ptr, 6, t06, t16, t26, t36, t46, t56, t66, channels, known, M, K)


def correlate(x: Tensor, grad: Tensor, size: int, *, c: Tensor | None = None, norm: Tensor | None = None) -> Tensor:
    """The gradient of the kernel from that of the convolution's output.

    With ``norm``, ``grad`` is the gradient after the norm; that of the convolution's output, ``p grad + q c + t`` with
    the three rows of ``norm``, is written in its place on the way. Each program sums some strips; the sums of all are
    summed at the end.

    Shape: x, grad and c (B, H, W, M), norm (3, M) in float32 -> (M, 1, size, size) in float32.
    """
    batch, height, width, dim = x.shape
    block = min(strip_width(width), WARPS * COLUMNS[size])
    strips, blocks = batch * triton.cdiv(width, block), triton.cdiv(dim, CHANNELS)
    parts = min(strips, max(1, PROGRAMS * multiprocessors(x.device) // blocks))
    shares = x.new_empty((parts, size * size, dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _correlate[(parts * blocks,)](
            x, grad, grad if c is None else c, shares if norm is None else norm, shares, height, strips, parts,
            WIDTH=width, M=dim, K=size, NORM=norm is not None, BLOCK_W=block, BLOCK_M=CHANNELS,
            EACH=CHANNELS_EACH, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return shares.sum(0).t().contiguous().view(dim, 1, size, size)
