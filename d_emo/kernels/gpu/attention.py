"""Window attention on NVIDIA GPUs, straight from the maps and in one kernel for each direction.

    out = repeat * sum over the partitions of  merge(softmax(q k^T / sqrt(d)) act(z))

The partitions differ only in where a window's tokens lie, so tiles are loaded from where they are and nothing is
gathered. q and k lie side by side in one tensor, and so do their gradients. A program owns some windows of one head of
an image. It makes a window's map once, keeps it in registers, and goes through the value in chunks of its columns; the
second partition adds to what the first has stored. The forward pass keeps nothing but its operands, the backward pass
makes the map and the activation anew.

Sizes come from the compiler's report (registers, spills, shared memory), not yet from a clock. A warp has 16 tokens. At
64 tokens and 64 columns in a chunk four programs share an H100's multiprocessor. The backward pass holds one more map
in float32, takes 32 columns, and two fit. Two chunks are on their way while one is worked on; float32 halves them.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from d_emo.kernels.dispatch import constant
from d_emo.kernels.gpu.convolution import multiprocessors
from d_emo.kernels.gpu.trial import check_one

LOG2_E = tl.constexpr(1.4426950408889634)
VARYING = ["first_part", "last_part", "held_part", "down", "across", "heads", "per_program"]
"""Numbers that a kernel is not compiled anew for."""


@triton.jit
def places(window, far, down, across, TALL: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr):
    """Row and column of each token of a window: side by side, or (far) ``down`` rows and ``across`` columns apart."""
    token = tl.arange(0, TOKENS)
    i, j = token // WIDE, token % WIDE
    row, column = window // across, window % across
    y = tl.where(far, i * down + row, row * TALL + i)
    x = tl.where(far, j * across + column, column * WIDE + j)
    return y, x


@triton.jit
def tile(pixels, first, REAL: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Offsets and mask of ``CHUNK`` of a head's ``WIDTH`` columns at the ``REAL`` tokens of a window."""
    columns = first + tl.arange(0, CHUNK)
    mask = (tl.arange(0, TOKENS) < REAL)[:, None] & (columns < WIDTH)[None, :]
    return pixels[:, None] + columns[None, :], mask


@triton.jit
def add(pointers, x, mask, there):
    """Store ``x``, or add it to what is ``there`` (0 or 1)."""
    x += tl.load(pointers, mask=tl.where(mask, there, 0) > 0, other=0.0).to(tl.float32)
    tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def attention_map(
    q, k, pixels, REAL: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, D_CHUNK: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """``softmax(q k^T SCALE)`` of a window in float32; keys that are padding weigh nothing."""
    logits = tl.full((TOKENS, TOKENS), 0.0, tl.float32)
    for first in tl.static_range(0, D, D_CHUNK):
        at, mask = tile(pixels, first, REAL, TOKENS, D, D_CHUNK)
        queries, keys = tl.load(q + at, mask=mask, other=0.0), tl.load(k + at, mask=mask, other=0.0)
        logits = tl.dot(queries, tl.trans(keys), logits)
    if REAL != TOKENS:
        logits = tl.where((tl.arange(0, TOKENS) < REAL)[None, :], logits, float("-inf"))
    weights = tl.exp2((logits - tl.max(logits, 1)[:, None]) * (SCALE * LOG2_E))
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def activation(z, mask, ACT: tl.constexpr):
    """The activation of ``z`` and its derivative, in float32; zero outside of the mask.

    They are zero there without the mask too. It keeps the compiler from moving all these steps behind the exchange of
    data that a product of matrices needs before Hopper, where several threads would do the same ones.

    The tail of GELU's normal distribution is 2 to a polynomial in |z|, fitted to its logarithm with the tail as weight.
    It is off by 3.7e-7 at most, far less than the operands of the product are rounded by, and takes half as many
    instructions as the error function.
    """
    value, slope = z, tl.full(z.shape, 1.0, tl.float32)
    if ACT == "gelu":
        size = tl.abs(z)
        power = -0.45927661657 + size * (-0.05253811926 + size * (0.00738725998 + size * -0.00051887031))
        tail = tl.exp2(-1.00000083447 + size * (-1.15108311176 + size * power))
        share = tl.where(z < 0, tail, 1.0 - tail)
        value = z * share
        slope = share + z * tl.exp2(z * z * (-0.5 * LOG2_E) - 1.3257480647361595)  # log2 of sqrt(2 pi)
    elif ACT == "silu":
        share = 1.0 / (1.0 + tl.exp2(z * (-1.0 * LOG2_E)))
        value = z * share
        slope = share + value * (1.0 - share)
    return tl.where(mask, value, 0.0), slope


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    qk, z, out, first_part, last_part, held_part, down, across, heads, per_program,
    TALL: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, D_CHUNK: tl.constexpr,
    E: tl.constexpr, E_CHUNK: tl.constexpr, ACT: tl.constexpr, REPEAT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Partitions ``first_part`` to ``last_part`` (0 is near, 1 is far); those after ``held_part`` add to ``out``.

    Grid: (images times heads, groups of ``per_program`` windows). All maps are contiguous.
    """
    REAL: tl.constexpr = TALL * WIDE
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    wide, qk_column, z_column = across * WIDE, 2 * heads * D, heads * E
    q = qk + image * (down * TALL * wide * qk_column) + head * D
    k = q + heads * D
    z += image * (down * TALL * wide * z_column) + head * E
    out += image * (down * TALL * wide * z_column) + head * E
    start = tl.program_id(1) * per_program
    for part in range(first_part, last_part):
        far = part == 1
        later = part - held_part  # 0 or 1
        for window in range(start, tl.minimum(start + per_program, down * across)):
            y, x = places(window, far, down, across, TALL, WIDE, TOKENS)
            pixels = (y * wide + x) * qk_column
            weights = attention_map(q, k, pixels, REAL, TOKENS, D, D_CHUNK, SCALE)
            weights = (weights * REPEAT).to(z.dtype.element_ty)
            for first in range(0, E, E_CHUNK):
                at, mask = tile((y * wide + x) * z_column, first, REAL, TOKENS, E, E_CHUNK)
                value, _ = activation(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), mask, ACT)
                mixed = tl.dot(weights, value.to(z.dtype.element_ty))
                add(out + at, mixed, mask, later)
        tl.debug_barrier()  # the next partition reads what other threads of this program have stored


@triton.jit(do_not_specialize=VARYING)
def backward_kernel(
    grad, qk, z, grad_qk, grad_z, first_part, last_part, held_part, down, across, heads, per_program,
    TALL: tl.constexpr, WIDE: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, D_CHUNK: tl.constexpr,
    E: tl.constexpr, E_CHUNK: tl.constexpr, ACT: tl.constexpr, REPEAT: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The gradients of `forward_kernel`, which has the same arguments."""
    REAL: tl.constexpr = TALL * WIDE
    image, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    wide, qk_column, z_column = across * WIDE, 2 * heads * D, heads * E
    q = qk + image * (down * TALL * wide * qk_column) + head * D
    k = q + heads * D
    grad_q = grad_qk + image * (down * TALL * wide * qk_column) + head * D
    grad_k = grad_q + heads * D
    z += image * (down * TALL * wide * z_column) + head * E
    grad += image * (down * TALL * wide * z_column) + head * E
    grad_z += image * (down * TALL * wide * z_column) + head * E
    start = tl.program_id(1) * per_program
    for part in range(first_part, last_part):
        far = part == 1
        later = part - held_part  # 0 or 1
        for window in range(start, tl.minimum(start + per_program, down * across)):
            y, x = places(window, far, down, across, TALL, WIDE, TOKENS)
            pixels = (y * wide + x) * qk_column
            weights = attention_map(q, k, pixels, REAL, TOKENS, D, D_CHUNK, SCALE)
            turned = tl.trans((weights * REPEAT).to(z.dtype.element_ty))
            product = tl.full((TOKENS, TOKENS), 0.0, tl.float32)
            for first in range(0, E, E_CHUNK):
                at, mask = tile((y * wide + x) * z_column, first, REAL, TOKENS, E, E_CHUNK)
                outer = tl.load(grad + at, mask=mask, other=0.0)
                value, slope = activation(tl.load(z + at, mask=mask, other=0.0).to(tl.float32), mask, ACT)
                product = tl.dot(outer, tl.trans(value.to(z.dtype.element_ty)), product)
                add(grad_z + at, tl.dot(turned, outer) * slope, mask, later)
            product *= weights * (REPEAT * SCALE)
            logits = (product - weights * tl.sum(product, 1)[:, None]).to(z.dtype.element_ty)  # their gradient
            for first in tl.static_range(0, D, D_CHUNK):
                at, mask = tile(pixels, first, REAL, TOKENS, D, D_CHUNK)
                queries, keys = tl.load(q + at, mask=mask, other=0.0), tl.load(k + at, mask=mask, other=0.0)
                add(grad_q + at, tl.dot(logits, keys), mask, later)
                add(grad_k + at, tl.dot(tl.trans(logits), queries), mask, later)
        tl.debug_barrier()


OPTIONS = "str act, int heads, int[] window, str mode, int repeat"
PARTS = {"near": (0, 1), "far": (1, 2), "spanning": (0, 2)}
MOST_TOKENS = 64
"""Of a window: the float32 maps of a larger one do not fit the registers."""

ENOUGH = 4
"""Programs for each multiprocessor, at least; the forward kernel has room for four at a time, the backward for two."""


@constant
def uses_tf32() -> bool:
    """Whether products of float32 may round their operands to TF32; the kernels do so."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def refuses(qk: Tensor, z: Tensor, window: Sequence[int]) -> str | None:
    """Why the kernels do not take these, or None: one precision (float32 as TF32), windows that are small enough."""
    if qk.dtype != z.dtype or (z.dtype == torch.float32 and not uses_tf32()):
        return "float32 without TF32, or two precisions"
    if window[0] * window[1] > MOST_TOKENS:
        return f"a window of more than {MOST_TOKENS} tokens"
    return None if z.numel() else "an empty batch"


def chunk_of(width: int, most: int) -> int:
    """How many columns of ``width`` a product takes at a time: a step costs about as much as 16 columns more."""
    return min((c for c in (64, 32, 16) if c <= most), key=lambda c: triton.cdiv(width, c) * (c + 16))


def launch(kernel: Any, maps: Sequence[Tensor], qk: Tensor, z: Tensor, options: Sequence[Any], row_bytes: int) -> None:
    """Run a kernel over all windows of all partitions.

    Where images and heads alone make `ENOUGH` programs, there is one launch, and a program does all the windows of its
    head, in all partitions. Elsewhere the windows are shared out, and a partition needs the other to be complete:
    there is a launch for each.

    Shape: qk (B, H, W, 2 C), z (B, H, W, M).

    Args:
        kernel: the forward or the backward one.
        maps: its tensors.
        qk, z: which of them tell the sizes.
        options: act, heads, window, mode, repeat.
        row_bytes: of a token's value in a chunk, at most.
    """
    act, heads, (tall, wide), mode, repeat = options
    (images, height, width, both), (first, last) = qk.shape, PARTS[mode]
    dim, down, across, programs = both // 2 // heads, height // tall, width // wide, images * heads
    groups = min(down * across, triton.cdiv(ENOUGH * multiprocessors(z.device), programs))
    each = triton.cdiv(down * across, groups)
    tokens = max(16, triton.next_power_of_2(tall * wide))
    sizes = dict(
        TALL=tall, WIDE=wide, TOKENS=tokens, D=dim, D_CHUNK=chunk_of(dim, 64), E=z.shape[-1] // heads,
        E_CHUNK=chunk_of(z.shape[-1] // heads, row_bytes // z.element_size()), ACT=act, REPEAT=repeat, SCALE=dim**-0.5,
    )  # fmt: skip

    for one in [(first, last)] if groups == 1 else [(part, part + 1) for part in range(first, last)]:
        run_kernel(
            kernel, (programs, triton.cdiv(down * across, each)), (*maps, *one, first, down, across, heads, each),
            num_warps=tokens // 16, **sizes,
        )  # fmt: skip


def run_kernel(kernel: Any, grid: tuple[int, ...], inputs: Sequence[Any], **sizes: Any) -> Any:
    """Run a kernel on its tensors' GPU; its loops are pipelined in three stages, or as memory allows.

    Returns:
        What Triton says of the compiled kernel.
    """
    with torch.cuda.device(inputs[0].device) if inputs[0].is_cuda else contextlib.nullcontext():
        for stages in (3, 2, 1):
            try:
                return kernel[grid](*inputs, **sizes, num_stages=stages, enable_fp_fusion=True)
            except OutOfResources:
                if stages == 1:
                    raise


def make_operator(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """An operator of PyTorch, with its gradients, that stands for `d_emo.kernels.attention.attend`.

    Shape: of the operator, qk (B, H, W, 2C), z (B, H, W, M) -> as z.

    Args:
        name: what PyTorch calls it.
        forward, backward: called as `launch` is, without its first and its last argument.
    """

    @torch.library.custom_op(
        f"d_emo::{name}", mutates_args=(), schema=f"(Tensor qk, Tensor z, {OPTIONS}) -> Tensor"
    )
    def attend(qk: Tensor, z: Tensor, *options: Any) -> Tensor:
        qk, z = qk.contiguous(), z.contiguous()
        out = torch.empty_like(z)
        forward((qk, z, out), qk, z, options)
        return out

    @torch.library.custom_op(
        f"d_emo::{name}_backward", mutates_args=(),
        schema=f"(Tensor grad, Tensor qk, Tensor z, {OPTIONS}) -> (Tensor, Tensor)",
    )  # fmt: skip
    def attend_backward(grad: Tensor, qk: Tensor, z: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        qk, z, grad = qk.contiguous(), z.contiguous(), grad.to(z.dtype).contiguous()
        grads = torch.empty_like(qk), torch.empty_like(z)
        backward((grad, qk, z, *grads), qk, z, options)
        return grads

    def keep_operands(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qk, z, *ctx.options = inputs
        ctx.save_for_backward(qk, z)

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *attend_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * len(ctx.options)

    attend.register_fake(lambda qk, z, *options: z.new_empty(z.shape))
    attend_backward.register_fake(lambda grad, qk, z, *options: (qk.new_empty(qk.shape), z.new_empty(z.shape)))
    attend.register_autograd(differentiate, setup_context=keep_operands)
    return attend


attend = make_operator(
    "window_attention",
    lambda *maps: launch(forward_kernel, *maps, row_bytes=128),
    lambda *maps: launch(backward_kernel, *maps, row_bytes=64),
)


def check(device: torch.device) -> None:
    """Try both kernels on small maps, in one launch and in several.

    Raises:
        RuntimeError: The result, or a gradient, is not that of `reference` in float64.
    """
    some = triton.cdiv(ENOUGH * multiprocessors(device), 2)  # images enough for one launch
    for dtype, window, images, narrow, wide, bound in (
        (torch.float32, (3, 5), 1, 24, 40, 5e-3), (torch.bfloat16, (7, 7), 1, 24, 40, 2e-2),
        (torch.bfloat16, (7, 7), some, 24, 40, 2e-2), (torch.bfloat16, (8, 8), 1, 72, 288, 2e-2),  # the last is XL's
    ):  # fmt: skip
        check_one(attend, device, dtype, window, images, narrow, wide, bound)
