"""Triton kernel of the gradient of a depthwise kernel: tap by tap the product of the map with that of the output.

A program has some channels and sums strips of columns, one after the other, down their rows. As in the convolution, a
thread keeps its columns apart; the sums of the k k taps are over all of them, and stay in registers.
"""

# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from d_emo.kernels.gpu.convolution import CHANNELS, CHANNELS_EACH, WARPS, multiprocessors, strip_width
from d_emo.kernels.gpu.convolution import _channels as _channels
from d_emo.kernels.gpu.convolution import _load_row as _load_row

COLUMNS = {3: 4, 5: 4, 7: 2}
"""Columns of a thread, at most, for each size of the kernel, whose rows of the gradient are kept too."""

PROGRAMS = 6
"""Programs of a summing kernel for each multiprocessor of the GPU: two rounds of three at a time."""


@triton.jit
def _gradient_row(g, c, g_ptr, row, height, start, channels, known, p, q, t, WIDTH: tl.constexpr, M: tl.constexpr,
                  COLUMNS: tl.constexpr, NORM: tl.constexpr):  # fmt: skip
    """A row of the gradient of the convolution's output, zero outside the map; with NORM ``p g + q c + t``, stored."""
    values = ()
    for j in tl.static_range(COLUMNS):
        mask = (start + j < WIDTH) & known
        value = g[j].to(tl.float32)
        if NORM:
            stored = (p * value + (q * c[j].to(tl.float32) + t)).to(g_ptr.dtype.element_ty)
            if row < height:
                tl.store(g_ptr + (row * WIDTH + start + j) * M + channels, stored, mask=mask)
            value = tl.where(mask, stored.to(tl.float32), 0.0)
        values = values + (tl.where(row < height, value, 0.0),)
    return values


@triton.jit(do_not_specialize=["height", "strips", "parts"])
def _correlate(x_ptr, g_ptr, c_ptr, norm_ptr, out_ptr, height, strips, parts, WIDTH: tl.constexpr, M: tl.constexpr,
               K: tl.constexpr, NORM: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
               EACH: tl.constexpr):  # fmt: skip
    """A part's share of the kernel's gradient: some strips, one after the other, for some channels; see `correlate`.

    The k rows of the gradient that meet a row of the map are kept, the lowest first. A row has been loaded while the
    one before it was worked on.
    """
    HALF: tl.constexpr = K // 2
    ROW: tl.constexpr = WIDTH * M
    STRIPS: tl.constexpr = (WIDTH + GROUPS * COLUMNS - 1) // (GROUPS * COLUMNS)
    BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    part = pid // BLOCKS
    channels, known = _channels(pid % BLOCKS, M, BLOCK_M, EACH)
    p = tl.load(norm_ptr + channels, mask=known, other=0.0)
    q = tl.load(norm_ptr + M + channels, mask=known, other=0.0)
    t = tl.load(norm_ptr + 2 * M + channels, mask=known, other=0.0)

    zero = tl.full((GROUPS, BLOCK_M), 0, tl.float32)
    sums = ()
    for _ in tl.static_range(K * K):
        sums = sums + (zero,)
    for strip in range(part, strips, parts):
        image = (strip // STRIPS) * (height.to(tl.int64) * ROW)
        start = strip % STRIPS * (GROUPS * COLUMNS) + COLUMNS * tl.arange(0, GROUPS)[:, None]
        xs, gs, cs = x_ptr + image, g_ptr + image, c_ptr + image
        kept = ()
        for _ in tl.static_range((K - 1) * COLUMNS):
            kept = kept + (zero,)
        for row in tl.static_range(HALF):
            below = tl.minimum(row, height - 1) * ROW  # where there is none, any
            g = _load_row(gs + below, start, channels, known, 0, COLUMNS, WIDTH, M)
            c = _load_row(cs + below, start, channels, known, 0, COLUMNS, WIDTH, M)
            lowest = _gradient_row(g, c, gs, row, height, start, channels, known, p, q, t, WIDTH, M, COLUMNS, NORM)
            higher = lowest
            for j in tl.static_range((K - 2) * COLUMNS):
                higher = higher + (kept[j],)
            kept = higher
        below = tl.minimum(HALF, height - 1) * ROW
        g = _load_row(gs + below, start, channels, known, 0, COLUMNS, WIDTH, M)
        c = _load_row(cs + below, start, channels, known, 0, COLUMNS, WIDTH, M)
        ahead = _load_row(xs, start, channels, known, -HALF, COLUMNS + HALF, WIDTH, M)
        for r in range(0, height):
            lowest = _gradient_row(
                g, c, gs, r + HALF, height, start, channels, known, p, q, t, WIDTH, M, COLUMNS, NORM
            )
            x = ()
            for j in tl.static_range(COLUMNS + K - 1):
                x = x + (ahead[j].to(tl.float32),)
            below = tl.minimum(r + HALF + 1, height - 1) * ROW
            g = _load_row(gs + below, start, channels, known, 0, COLUMNS, WIDTH, M)
            c = _load_row(cs + below, start, channels, known, 0, COLUMNS, WIDTH, M)
            below = tl.minimum(r + 1, height - 1) * ROW
            ahead = _load_row(xs + below, start, channels, known, -HALF, COLUMNS + HALF, WIDTH, M)
            rows = lowest
            for j in tl.static_range((K - 1) * COLUMNS):
                rows = rows + (kept[j],)
            totals = ()
            for i in tl.static_range(K):
                for j in tl.static_range(K):
                    total = sums[i * K + j]
                    for one in tl.static_range(COLUMNS):
                        total += x[one + j] * rows[i * COLUMNS + one]
                    totals = totals + (total,)
            sums = totals
            higher = ()
            for j in tl.static_range((K - 1) * COLUMNS):
                higher = higher + (rows[j],)
            kept = higher
    out_ptr += part * (K * K * M) + channels
    for i in tl.static_range(K * K):
        tl.store(out_ptr + i * M, tl.sum(sums[i], axis=0)[None, :], mask=known)


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
            WIDTH=width, M=dim, K=size, NORM=norm is not None, COLUMNS=block // WARPS, GROUPS=WARPS, BLOCK_M=CHANNELS,
            EACH=CHANNELS_EACH, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return shares.sum(0).t().contiguous().view(dim, 1, size, size)
