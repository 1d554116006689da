"""Triton kernel of a depthwise convolution of stride 1 that keeps the size, with batch statistics of its result.

Maps are (B, H, W, M), contiguous. A program has a strip of columns and some channels, and walks down the rows of an
image. The strip is cut into `WARPS` groups of neighbouring columns, a warp for each. A thread has two channels of all
columns of its group and keeps them apart, as tensors of a tuple: so it loads each column of a row, and those beside the
group, once, turns it into float32 once, and uses it for all outputs and taps that meet it.

Each thread keeps all k k taps of its channels in registers. The widest loads, of 8 channels in bfloat16, would need 200
registers for the taps (k = 5); taps loaded anew for each row would take more of the cache's bandwidth than the map.

Sums are float32. Weights are (k k, M), float32; see `taps_of`. Tuples need Triton 3.3.
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
"""Channels of a program: those of one warp."""

WARPS = 4

MOST_REGISTERS = 128
"""Of a thread, so that four programs share a multiprocessor: what the row to be added takes beyond them is spilled."""


@triton.jit
def _channels(block, M: tl.constexpr, BLOCK_M: tl.constexpr, EACH: tl.constexpr):
    """Numbers and mask of a block of channels. Shape: (1, BLOCK_M), both."""
    channels = block * BLOCK_M + tl.max_contiguous(tl.arange(0, BLOCK_M), EACH)[None, :]
    return channels, channels < M


@triton.jit
def _load_row(row_ptr, start, channels, known, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr,
              M: tl.constexpr):  # fmt: skip
    """The columns ``start + FIRST`` to ``start + LAST`` of a row, without the last; zero beside the map."""
    row = ()
    for j in tl.static_range(FIRST, LAST):
        column = start + j
        mask = (column >= 0) & (column < WIDTH) & known
        row = row + (tl.load(row_ptr + (column * M + channels), mask=mask, other=0.0),)
    return row


@triton.jit
def _store_row(totals, row, start, out_ptr, beside, bias, channels, known, pivot, sums, squares, WIDTH: tl.constexpr,
               M: tl.constexpr, COLUMNS: tl.constexpr, PLUS: tl.constexpr, ACT: tl.constexpr,
               STATISTICS: tl.constexpr):  # fmt: skip
    """Finish a row of the output; with PLUS the row ``beside`` it is added.

    Returns the first value of all, and the sums of the distances from it so far.
    """
    for c in tl.static_range(COLUMNS):
        mask = (start + c < WIDTH) & known
        place = (row * WIDTH + start + c) * M + channels
        total = totals[c]
        if ACT:
            total += bias
            root = tl.rsqrt(1.0 + tl.exp2(total * -1.4426950408889634))  # fewer instructions than a division
            total = total * root * root
        if PLUS:
            total += beside[c].to(tl.float32)
        out = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, out, mask=mask)
        if STATISTICS:
            value = out.to(tl.float32)
            if c == 0:
                pivot = tl.where(row == 0, value, pivot)
            distance = tl.where(start + c < WIDTH, value - pivot, 0.0)
            sums += distance
            squares += distance * distance
    return pivot, sums, squares


@triton.jit(do_not_specialize=["height"])
def _convolve(x_ptr, w_ptr, bias_ptr, plus_ptr, out_ptr, mean_ptr, m2_ptr, height, WIDTH: tl.constexpr, M: tl.constexpr,
              K: tl.constexpr, FLIP: tl.constexpr, PLUS: tl.constexpr, ACT: tl.constexpr, STATISTICS: tl.constexpr,
              COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, EACH: tl.constexpr):  # fmt: skip
    """A strip of an image, all rows, for some channels; see `convolve`.

    The totals of the k - 1 rows under way are kept, those of the uppermost first. A row of the map that comes completes
    that one and takes part in k - 1 others. It has been loaded while the row before it was worked on, and so has the
    row of what is added. That may lie where the results are stored: loaded one by one in between, each value would wait
    for the store before it.
    """
    HALF: tl.constexpr = K // 2
    STRIPS: tl.constexpr = (WIDTH + GROUPS * COLUMNS - 1) // (GROUPS * COLUMNS)
    BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    pid = tl.program_id(0)
    part = pid // BLOCKS
    channels, known = _channels(pid % BLOCKS, M, BLOCK_M, EACH)
    start = part % STRIPS * (GROUPS * COLUMNS) + COLUMNS * tl.arange(0, GROUPS)[:, None]
    image = (part // STRIPS) * (height.to(tl.int64) * (WIDTH * M))
    x_ptr += image
    out_ptr += image
    plus_ptr += image

    taps = ()
    for i in tl.static_range(K * K):
        tap = K * K - 1 - i if FLIP else i
        taps = taps + (tl.load(w_ptr + tap * M + channels, mask=known, other=0.0),)
    bias = tl.load(bias_ptr + channels, mask=known, other=0.0)
    zero = tl.full((GROUPS, BLOCK_M), 0, tl.float32)
    pivot, sums, squares = zero, zero, zero
    under_way = ()
    for _ in tl.static_range((K - 1) * COLUMNS):
        under_way = under_way + (zero,)
    ahead = _load_row(x_ptr, start, channels, known, -HALF, COLUMNS + HALF, WIDTH, M)
    beside = ahead
    if PLUS:
        beside = _load_row(plus_ptr, start, channels, known, 0, COLUMNS, WIDTH, M)
    for r in range(0, height):
        row = ()
        for j in tl.static_range(COLUMNS + K - 1):
            row = row + (ahead[j].to(tl.float32),)
        below = x_ptr + tl.minimum(r + 1, height - 1) * (WIDTH * M)  # after the last row, any
        ahead = _load_row(below, start, channels, known, -HALF, COLUMNS + HALF, WIDTH, M)
        after = beside
        if PLUS:
            above = plus_ptr + tl.minimum(tl.maximum(r - HALF + 1, 0), height - 1) * (WIDTH * M)
            after = _load_row(above, start, channels, known, 0, COLUMNS, WIDTH, M)
        done, others = (), ()
        for i in tl.static_range(K):
            for c in tl.static_range(COLUMNS):
                total = under_way[i * COLUMNS + c] if i < K - 1 else zero
                for j in tl.static_range(K):
                    total += row[c + j] * taps[(K - 1 - i) * K + j]
                if i == 0:
                    done = done + (total,)
                else:
                    others = others + (total,)
        under_way = others
        if r >= HALF:
            pivot, sums, squares = _store_row(
                done, r - HALF, start, out_ptr, beside, bias, channels, known, pivot, sums, squares, WIDTH, M,
                COLUMNS, PLUS, ACT, STATISTICS,
            )  # fmt: skip
        beside = after
    # What lies below the map is zero, so the rows still under way are complete.
    for i in tl.static_range(HALF):
        left = ()
        for c in tl.static_range(COLUMNS):
            left = left + (under_way[i * COLUMNS + c],)
        last = height - HALF + i
        added = left  # of no use
        if PLUS:
            below = plus_ptr + tl.maximum(last, 0) * (WIDTH * M)
            added = _load_row(below, start, channels, known, 0, COLUMNS, WIDTH, M)
        if last >= 0:
            pivot, sums, squares = _store_row(
                left, last, start, out_ptr, added, bias, channels, known, pivot, sums, squares, WIDTH, M, COLUMNS,
                PLUS, ACT, STATISTICS,
            )  # fmt: skip
    if STATISTICS:
        count = height * tl.minimum(tl.maximum(WIDTH - start, 0), COLUMNS).to(tl.float32)  # of each group
        share = count / tl.sum(count, axis=0)[None, :]
        offset = sums / tl.maximum(count, 1.0)
        mean = tl.where(count > 0, pivot + offset, 0.0)  # a group beside the map may have any pivot
        average = tl.sum(share * mean, axis=0)[None, :]
        distance = tl.where(count > 0, mean - average, 0.0)
        spread = tl.sum(squares - sums * offset + count * distance * distance, axis=0)[None, :]
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
            COLUMNS=block // WARPS, GROUPS=WARPS, BLOCK_M=CHANNELS, EACH=CHANNELS_EACH, num_warps=WARPS,
            enable_fp_fusion=True, maxnreg=None if plus is None or len(taps) > 25 else MOST_REGISTERS,
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
