"""Window attention of near and far windows in one pass, on NVIDIA GPUs, for maps of few tokens.

    out = repeat * (near(softmax(q k^T / sqrt(d)) act(z)) + far(the same))

`d_emo.kernels.gpu.attention` goes over the value once for each partition, and at the sizes that matter the second pass
finds nothing of it in the cache. Here a program owns a head of an image. It keeps the maps of all windows of both
partitions in registers (16 x 16 tokens in windows of 8 x 8: eight maps, 64 KB in bfloat16), reads each column of the
value once, and writes each column of the result once. The backward pass keeps the gradients of the maps too, in
float32: all registers of a multiprocessor. It reads each column of value and gradient once and writes each once.

Tokens are counted by near window and, inside it, by the far window that they belong to. A near and a far window share
the same number of tokens, a part. So near windows are (N, parts of a window), and exchanging the first two of (N, N,
tokens of a part) makes far windows of them; see `turn`. Each warp does windows of its own. For that the strides of far
windows must divide the sides of near ones, and all numbers be powers of two.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d_emo.device import synchronize
from d_emo.kernels.autotune import tuner
from d_emo.kernels.dispatch import constant
from d_emo.kernels.gpu.attention import (
    LOG2_E,
    activation,
    chunk_of,
    make_operator,
    run_kernel,
)
from d_emo.kernels.gpu.attention import attend as two_passes
from d_emo.kernels.gpu.convolution import multiprocessors
from d_emo.kernels.gpu.trial import check_one

MOST_TOKENS = 256
"""Of a map."""

MOST_BYTES = 2**15
"""Of a partition's attention maps: those of two fill half of the registers of two programs."""


@triton.jit
def pixels_of(
    FIRST: tl.constexpr, NUMBER: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):  # fmt: skip
    """Where the tokens of windows lie, of ``NUMBER`` partitions from ``FIRST`` (0 is near). Shape: (windows, T, 1)."""
    N: tl.constexpr = DOWN * ACROSS
    PART_WIDE: tl.constexpr = WIDE // ACROSS
    PART: tl.constexpr = (TALL // DOWN) * PART_WIDE
    number = FIRST * N + tl.arange(0, NUMBER * N)[:, None, None]
    token = tl.arange(0, TALL * WIDE)[None, :, None]
    is_far, window, part, inner = number >= N, number % N, token // PART, token % PART
    near, far = tl.where(is_far, part, window), tl.where(is_far, window, part)
    y = near // ACROSS * TALL + inner // PART_WIDE * DOWN + far // ACROSS
    x = near % ACROSS * WIDE + inner % PART_WIDE * ACROSS + far % ACROSS
    return y * (ACROSS * WIDE) + x


@triton.jit
def turn(x):
    """Near windows of far ones, or the other way round. Shape: (N, T, any) -> same."""
    N: tl.constexpr = x.shape[0]
    parts = tl.reshape(x, (N, N, x.shape[1] // N, x.shape[2]))
    return tl.reshape(tl.permute(parts, 1, 0, 2, 3), x.shape)


@triton.jit
def both(x):
    """The near windows and, after them, the far ones. Shape: (N, T, any) -> (2 N, T, any).

    A select, since after a `tl.join` Triton lays out products for operands of 8 bits.
    """
    N: tl.constexpr = x.shape[0]
    is_far = tl.arange(0, 2)[:, None, None, None] == 1
    near = tl.broadcast_to(x[None], (2, N, x.shape[1], x.shape[2]))
    far = tl.broadcast_to(turn(x)[None], (2, N, x.shape[1], x.shape[2]))
    return tl.reshape(tl.where(is_far, far, near), (2 * N, x.shape[1], x.shape[2]))


@triton.jit
def total(x):
    """The sum over the partitions, in near windows. Shape: (2 N, T, any) -> (N, T, any)."""
    N: tl.constexpr = x.shape[0] // 2
    near, far = tl.split(tl.permute(tl.reshape(x, (2, N, x.shape[1], x.shape[2])), 1, 2, 3, 0))
    return near + turn(far)


@triton.jit
def once(x):
    """``x``, computed once: what is cheap, the compiler computes anew for each layout in which it is needed.

    It does not do so with a reduction, and GELU is not as cheap as it takes it for. Shape: (N, T, any) -> same.
    """
    return tl.max(x[:, :, :, None], 3)


@triton.jit
def chunk(first, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Numbers of ``CHUNK`` of ``WIDTH`` columns, and which of them there are. Shape: (1, 1, CHUNK), both."""
    columns = first + tl.arange(0, CHUNK)[None, None, :]
    return columns, columns < WIDTH


@triton.jit
def fetch(pointers, mask, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """What is there; zero beside the columns. Shape: pointers' -> same."""
    if WIDTH % CHUNK == 0:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def attention_maps(q, k, rows, AXIS: tl.constexpr, D: tl.constexpr, D_CHUNK: tl.constexpr, SCALE: tl.constexpr):
    """``softmax(q k^T SCALE)`` along an axis. Shape: rows (N, T, 1), where tokens start -> (N, T, T), float32."""
    logits = tl.full((rows.shape[0], rows.shape[1], rows.shape[1]), 0.0, tl.float32)
    for first in range(0, D, D_CHUNK):
        columns, mask = chunk(first, D, D_CHUNK)
        queries, keys = fetch(q + rows + columns, mask, D, D_CHUNK), fetch(k + rows + columns, mask, D, D_CHUNK)
        logits = tl.dot(queries, tl.trans(keys, 0, 2, 1), logits)
    weights = tl.exp2(logits * (SCALE * LOG2_E) - tl.expand_dims(tl.max(logits, AXIS) * (SCALE * LOG2_E), AXIS))
    return weights * tl.expand_dims(1.0 / tl.sum(weights, AXIS), AXIS)


@triton.jit(do_not_specialize=["heads"])
def forward_kernel(
    qk, z, out, heads, TALL: tl.constexpr, WIDE: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
    D: tl.constexpr, D_CHUNK: tl.constexpr, E: tl.constexpr, E_CHUNK: tl.constexpr, ACT: tl.constexpr,
    REPEAT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One head of an image. Grid: (images times heads,). All maps are contiguous."""
    image, head = (tl.program_id(0) // heads).to(tl.int64) * (DOWN * TALL * ACROSS * WIDE), tl.program_id(0) % heads
    q = qk + image * (2 * heads * D) + head * D
    k = q + heads * D
    z += image * (heads * E) + head * E
    out += image * (heads * E) + head * E
    near = pixels_of(0, 1, TALL, WIDE, DOWN, ACROSS)
    far = pixels_of(1, 1, TALL, WIDE, DOWN, ACROSS)
    near_maps = attention_maps(q, k, near * (2 * heads * D), 2, D, D_CHUNK, SCALE)
    near_maps = (near_maps * REPEAT).to(z.dtype.element_ty)
    far_maps = (attention_maps(q, k, far * (2 * heads * D), 2, D, D_CHUNK, SCALE) * REPEAT).to(z.dtype.element_ty)
    rows = near * (heads * E)
    for first in range(0, E, E_CHUNK):
        columns, mask = chunk(first, E, E_CHUNK)
        value, _ = activation(fetch(z + rows + columns, mask, E, E_CHUNK).to(tl.float32), mask, ACT)
        value = value.to(z.dtype.element_ty)
        mixed = tl.dot(near_maps, value, turn(tl.dot(far_maps, turn(value))))
        tl.store(out + rows + columns, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["heads"])
def backward_kernel(
    grad, qk, z, grad_qk, grad_z, heads, TALL: tl.constexpr, WIDE: tl.constexpr, DOWN: tl.constexpr,
    ACROSS: tl.constexpr, D: tl.constexpr, D_CHUNK: tl.constexpr, E: tl.constexpr, E_CHUNK: tl.constexpr,
    ACT: tl.constexpr, REPEAT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The gradients of `forward_kernel`, which has the same arguments.

    The windows of both partitions are one batch of products. The loop keeps the maps with a key in each row, in the
    value's precision, and the maps' gradients with a query in each, in float32. The maps are made anew for the latter.
    """
    image, head = (tl.program_id(0) // heads).to(tl.int64) * (DOWN * TALL * ACROSS * WIDE), tl.program_id(0) % heads
    q = qk + image * (2 * heads * D) + head * D
    k = q + heads * D
    grad_q = grad_qk + image * (2 * heads * D) + head * D
    grad_k = grad_q + heads * D
    grad += image * (heads * E) + head * E
    z += image * (heads * E) + head * E
    grad_z += image * (heads * E) + head * E
    near = pixels_of(0, 1, TALL, WIDE, DOWN, ACROSS)
    windows = pixels_of(0, 2, TALL, WIDE, DOWN, ACROSS)
    narrow = windows * (2 * heads * D)
    turned = (attention_maps(k, q, narrow, 1, D, D_CHUNK, SCALE) * REPEAT).to(z.dtype.element_ty)
    product = tl.full(turned.shape, 0.0, tl.float32)
    for first in range(0, E, E_CHUNK):
        columns, mask = chunk(first, E, E_CHUNK)
        at = near * (heads * E) + columns
        outer = fetch(grad + windows * (heads * E) + columns, mask, E, E_CHUNK)
        value, slope = activation(fetch(z + at, mask, E, E_CHUNK).to(tl.float32), mask, ACT)
        value = both(once(value).to(z.dtype.element_ty))
        product = tl.dot(outer, tl.trans(value, 0, 2, 1), product)
        mixed = total(tl.dot(turned, outer)) * once(slope)
        tl.store(grad_z + at, mixed.to(grad_z.dtype.element_ty), mask=mask)
    weights = attention_maps(q, k, narrow, 2, D, D_CHUNK, SCALE)
    product *= weights * (REPEAT * SCALE)
    logits = (product - weights * tl.sum(product, 2)[:, :, None]).to(z.dtype.element_ty)  # their gradient
    for first in range(0, D, D_CHUNK):
        columns, mask = chunk(first, D, D_CHUNK)
        queries, keys = fetch(q + narrow + columns, mask, D, D_CHUNK), fetch(k + narrow + columns, mask, D, D_CHUNK)
        at = near * (2 * heads * D) + columns
        tl.store(grad_q + at, total(tl.dot(logits, keys)).to(grad_qk.dtype.element_ty), mask=mask)
        mixed = total(tl.dot(tl.trans(logits, 0, 2, 1), queries))
        tl.store(grad_k + at, mixed.to(grad_qk.dtype.element_ty), mask=mask)


TROUBLE: dict[tuple[torch.device, bool], str] = {}
"""By GPU, in training and in inference: how these kernels failed `check`, or that they are slower than the others."""


@constant
def trouble(device: torch.device, training: bool) -> str | None:
    """Why the kernels are not for this device, or None."""
    return TROUBLE.get((device, training))


def refuses(qk: Tensor, z: Tensor, window: Sequence[int], mode: str) -> str | None:
    """Why the kernels do not take these, or None; those of `d_emo.kernels.gpu.attention` do."""
    (tall, wide), (height, width) = window, z.shape[1:3]
    down, across, tokens = height // tall, width // wide, tall * wide
    if mode != "spanning" or height * width == tokens:
        return "one partition only"
    if why := trouble(z.device, torch.is_grad_enabled()):
        return why
    if height * width > MOST_TOKENS:
        return f"a map of more than {MOST_TOKENS} tokens"
    if tokens < 16 or any(n & (n - 1) for n in (down, across, tall, wide)) or tall % down or wide % across:
        return "windows whose sides are no powers of two, too small, or not divided by the strides of far ones"
    if height * width * tokens * z.element_size() > MOST_BYTES:
        return "maps of float32 that do not fit the registers"
    return None


def launch(kernel: Any, maps: Sequence[Tensor], qk: Tensor, z: Tensor, options: Sequence[Any], warps: int) -> Any:
    """Run a kernel over all heads of all images; returns what Triton says of the compiled kernel.

    Shape: qk (B, H, W, 2 C), z (B, H, W, M).

    Args:
        kernel: the forward or the backward one.
        maps: its tensors.
        qk, z: which of them tell the sizes.
        options: act, heads, window, mode, repeat.
        warps: for each near window, of four at a time.
    """
    act, heads, (tall, wide), _, repeat = options
    (images, height, width, _), dim = qk.shape, qk.shape[-1] // 2 // heads
    return run_kernel(
        kernel, (images * heads,), (*maps, heads), TALL=tall, WIDE=wide, DOWN=height // tall, ACROSS=width // wide,
        D=dim, D_CHUNK=chunk_of(dim, 64 // z.element_size()), E=z.shape[-1] // heads,
        E_CHUNK=chunk_of(z.shape[-1] // heads, 64 // z.element_size()), ACT=act, REPEAT=repeat, SCALE=dim**-0.5,
        num_warps=warps * min(4, height * width // (tall * wide)),
    )  # fmt: skip


attend = make_operator(
    "spanning_attention",
    lambda *maps: launch(forward_kernel, *maps, warps=1),
    lambda *maps: launch(backward_kernel, *maps, warps=2),
)

TRIAL = (8, 8), 1, 64, 256
"""Window, images, and a head's columns of query and value: S-2's at 256 px, whose kernels are built with it."""


def check(device: torch.device) -> None:
    """Try the kernels on a small map. Where they fail it is kept in `TROUBLE`, and other kernels take their place.

    Raises:
        torch.OutOfMemoryError: This says nothing of the kernels.
        RuntimeError: They broke the GPU.
    """
    try:
        check_one(attend, device, torch.bfloat16, *TRIAL, bound=2e-2)
        check_spills(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, the driver, or a difference
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        failed = f"failed their trial on this GPU ({str(error).strip().splitlines()[0]})"
        TROUBLE.update({(device, training): failed for training in (True, False)})
    else:
        if device.type == "cuda":
            compare_speed(device)


def compare_speed(device: torch.device, images: int | None = None, heads: int = 6) -> None:
    """Time the kernels, and those of a pass for each partition, at S-2's size; the slower ones' place is last.

    Without ``images`` there are four heads for each multiprocessor: as in large batches, none is idle in the end.
    The choice is kept as all are, see `d_emo.kernels.autotune`.
    """
    (tall, wide), _, narrow, width = TRIAL
    operators = {"one pass": attend, "a pass for each partition": two_passes}
    shape = images or triton.cdiv(4 * multiprocessors(device), heads), 2 * tall, 2 * wide
    for training in (True, False):
        qk, z = (
            torch.randn(*shape, heads * n, device=device, dtype=torch.bfloat16, requires_grad=training)
            for n in (2 * narrow, width)
        )

        def trial(name: str, qk: Tensor = qk, z: Tensor = z, training: bool = training) -> None:
            out = operators[name](qk, z, "gelu", heads, [tall, wide], "spanning", 1)
            if training:
                torch.autograd.grad(out, (qk, z), out.detach())
            synchronize(device)

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        key = f"window_attention on {name}, {'training' if training else 'inference'}, S-2 at 256 px"
        form, times = tuner.choose(key, list(operators), trial)
        if form != "one pass":
            ms = [f"{times[each]:.3g} ms" for each in operators] if times else ["slower", "faster"]
            TROUBLE[device, training] = f"{ms[0]} here, {form} {ms[1]}"


MOST_SPILLS = 600
"""Registers of a thread: 220 to 450 are usual; where the compiler gives up it is thousands."""


def check_spills(device: torch.device) -> None:
    """Raise RuntimeError if the backward kernel, which fills all registers, has been compiled without optimisation."""
    (height, width), images, narrow, wide = TRIAL
    qk, z = (torch.zeros(images, 2 * height, 2 * width, n, device=device).bfloat16() for n in (4 * narrow, 2 * wide))
    maps, options = (z, qk, z, torch.empty_like(qk), torch.empty_like(z)), ("gelu", 2, (height, width), "spanning", 1)
    spills = getattr(launch(backward_kernel, maps, qk, z, options, warps=2), "n_spills", 0)
    if spills > MOST_SPILLS:
        raise RuntimeError(f"the compiler spilled {spills} registers of a thread")
