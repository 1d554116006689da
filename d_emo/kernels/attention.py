"""Attention inside the windows of a map.

    out = sum over the partitions of  merge(softmax(q k^T / sqrt(d)) act(z)),  q, k and act(z) split into windows

The plain form stacks the windows of all partitions and calls the library's attention once. On a CPU the library has no
fused kernel for a value wider than the query, and its general form copies each operand once more, scales two of them,
looks for rows of minus infinity and, in bfloat16, does all of it in float32.

On an NVIDIA GPU it is one kernel in each direction, which gathers nothing: see `d_emo.kernels.gpu.attention`,
and `d_emo.kernels.gpu.spanning` where the map is small enough to go over it once for both partitions.

The CPU form gathers each operand once, in the order that the products want, for a few images or heads at a time, so
that the gathered windows stay in the cache and their memory is used again. Its gradient keeps the attention maps and
the value before the activation, and makes everything else anew. In a compiled network it is an operator that the
compiler calls as it is: what the compiler makes of the single steps, or of the library's attention, takes longer.

Where there is a C compiler, a form in C goes over an image's head at a time, gathers, multiplies and sums in the cache,
and keeps no attention maps: see `d_emo.kernels.native`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo.kernels import native
from d_emo.kernels.activation import Activation, activate, activate_backward
from d_emo.kernels.dispatch import Form, lowered, run, triton_refuses
from d_emo.kernels.linear import linear, unactivated
from d_emo.kernels.partitions import (
    PARTITIONS,
    AttentionMode,
    FarPartition,
    any_size,
    fold,
    gather,
    is_free,
    regroup,
    unfold,
)

CHUNK = 2**20
"""Elements of the value that are gathered at a time: 4 MB in float32, for each partition."""

FROZEN_CHUNK = 2**18
"""The same without a gradient, where nothing of a chunk is kept: 1 MB in float32."""


def window_attention(
    qk: nn.Module, u: Tensor, x: Tensor, value: nn.Module | None = None, act: nn.Module | None = None, *, heads: int,
    window: tuple[int, ...], mode: AttentionMode, merge: bool = True,
) -> Tensor:  # fmt: skip
    """The attention maps of ``u`` weigh ``act(value(x))`` in every window of a mode's partitions.

    Args:
        qk: makes queries and, after them, keys of ``u``.
        u: the map that is compared with itself.
        x: the map that is weighed.
        value, act: what is made of ``x`` first; without them it is weighed as it is.
        heads: that the channels of queries, keys and value are divided among.
        window: height and width of a window, or its size along as many axes as the maps have; divides the map.
        mode: near, far, or both summed.
        merge: on a map of one window, compute the partitions' common result once (the same sum).

    Shape: u (B, H, W, C), x (B, H, W, K) -> (B, H, W, M), M the width of the value.
    """
    z, kind = unactivated(value, x, act)  # (B, H, W, M)
    return attend(linear(qk, u), z, act=kind, heads=heads, window=window, mode=mode, merge=merge)


@torch.fx.wrap
def attend(
    qk: Tensor, z: Tensor, *, act: Activation = "none", heads: int, window: tuple[int, ...], mode: AttentionMode,
    repeat: int = 1, merge: bool = True,
) -> Tensor:  # fmt: skip
    """``repeat`` times `window_attention` of given queries with keys, and of a value before its activation.

    One node of a `torch.fx` graph.

    Shape: qk (B, H, W, 2C), z (B, H, W, M) -> (B, H, W, M).
    """
    if merge and not is_free(z) and tuple(z.shape[1:-1]) == tuple(window):  # near and far are the same tokens
        mode, repeat = "near", repeat * len(PARTITIONS[mode])
    if len(window) == 1:
        options = {"act": act, "heads": heads, "window": (*window, 1), "mode": mode, "repeat": repeat, "merge": merge}
        return attend(qk.unsqueeze(2), z.unsqueeze(2), **options).squeeze(2)
    if len(window) > 2:
        return _folded(qk, z, act, heads, window, mode, repeat)
    with any_size(z):
        return run("window_attention", WINDOW_ATTENTION, z, qk, act, heads, tuple(window), mode, repeat)


def _folded(
    qk: Tensor, z: Tensor, act: Activation, heads: int, window: Sequence[int], mode: AttentionMode, repeat: int
) -> Tensor:
    """`attend` in windows of more than two axes, by that of one less. Shape: qk (B, T, ..., 2C), z (B, T, ..., M)."""
    total = None
    for part in ("near", "far") if mode == "spanning" else (mode,):
        mixed = attend(
            fold(qk, window, part), fold(z, window, part), act=act, heads=heads, mode=part, repeat=repeat, merge=False,
            window=(window[0] * window[1], *window[2:]),
        )  # fmt: skip
        mixed = unfold(mixed, window, part, z.shape[0])
        total = mixed if total is None else total + mixed
    return total


def _triton_refuses(z: Tensor, qk: Tensor, act: Activation, heads: int, window: Sequence[int], *_: Any) -> str | None:
    if why := triton_refuses(z, qk):
        return why
    from d_emo.kernels.gpu import attention as gpu

    return gpu.refuses(*lowered(qk, z), window)


def _triton(z: Tensor, qk: Tensor, *options: Any) -> Tensor:
    from d_emo.kernels.gpu import attention as gpu

    return gpu.attend(*lowered(qk, z), *options)


def _spanning_refuses(
    z: Tensor, qk: Tensor, act: Activation, heads: int, window: Sequence[int], mode: AttentionMode, *_: Any
) -> str | None:
    if why := _triton_refuses(z, qk, act, heads, window):
        return why
    from d_emo.kernels.gpu import spanning

    return spanning.refuses(*lowered(qk, z), window, mode)


def _spanning(z: Tensor, qk: Tensor, *options: Any) -> Tensor:
    from d_emo.kernels.gpu import spanning

    return spanning.attend(*lowered(qk, z), *options)


def _cpu_refuses(z: Tensor, qk: Tensor, *_: Any) -> str | None:
    return None if z.device.type == "cpu" else "not on a CPU"


def _cpu(z: Tensor, qk: Tensor, *options: Any) -> Tensor:
    qk, z = lowered(qk, z)
    keep = torch.is_grad_enabled() and (qk.requires_grad or z.requires_grad)
    if torch.compiler.is_compiling():
        return _attend(qk, z, *options, keep)[0]
    if keep:
        return _WindowAttention.apply(qk, z, Layout(*options))
    with torch.autocast("cpu", enabled=False):
        return forward(qk, z, Layout(*options))


def _native_refuses(z: Tensor, qk: Tensor, *_: Any) -> str | None:
    qk, z = lowered(qk, z)
    return native.refuses(z, qk)


def _native(z: Tensor, qk: Tensor, *options: Any) -> Tensor:
    qk, z = lowered(qk, z)
    return _NativeAttention.apply(qk.contiguous(), z.contiguous(), options)


class _NativeAttention(torch.autograd.Function):
    """Keeps queries, keys and the value before its activation; the maps are made anew."""

    @staticmethod
    def forward(ctx: Any, qk: Tensor, z: Tensor, options: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(qk, z)
        ctx.options = options
        return native.attention(qk, z, *options)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *native.attention(*ctx.saved_tensors, *ctx.options, grad.contiguous()), None


def _steps(q: Tensor, k: Tensor, value: Tensor) -> Tensor:
    """Attention in steps that all counters of operations know; some pass over the library's. Shape: as it."""
    return torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-2, -1)).softmax(-1), value)


def _library(
    z: Tensor, qk: Tensor, act: Activation, heads: int, window: Sequence[int], mode: AttentionMode, repeat: int,
    attention: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:  # fmt: skip
    """In tensors of at most four axes, as Core ML wants them."""
    value = activate(z, act)
    (h, w), (batch, height, width, _), total = window, z.shape, None
    n, m, free = height // h, width // w, is_free(z)
    for partition in PARTITIONS[mode]:
        far, operands = partition is FarPartition, []
        for x in (*qk.chunk(2, dim=-1), value):
            dim = x.shape[-1]
            x = gather(x, (h, w)) if far else x  # (B, n h, m w, C or M), a window's tokens side by side
            x = x.reshape(batch * n, h, m, w * dim).transpose(1, 2)  # (B n, m, h, w C)
            operands.append(regroup(x, batch * n * m, h * w, heads, dim // heads, copy=free).transpose(1, 2))
        mixed = attention(*operands).transpose(1, 2)  # (B n m, h w, heads, M / heads)
        mixed = regroup(mixed, batch * n, m, h, w * dim, copy=free).transpose(1, 2)
        mixed = regroup(mixed, batch, height, width, dim, copy=free)
        mixed = gather(mixed, (n, m)) if far else mixed  # (B, H, W, M)
        total = mixed if total is None else total + mixed
    return repeat * total if repeat != 1 else total


WINDOW_ATTENTION = (
    Form("Triton, both partitions in one pass", _spanning, _spanning_refuses),
    Form("Triton", _triton, _triton_refuses),
    Form("CPU, in chunks", _cpu, _cpu_refuses, rival=True),
    Form("C, a head at a time", _native, _native_refuses, rival=True),
    Form("the library's attention", _library, lambda *_: None, rival=True),
    Form("product, softmax, product", functools.partial(_library, attention=_steps)),
)


@dataclass(frozen=True)
class Layout:
    """How maps are cut into batches of matrices; see `window_attention` for the fields.

    A chunk is some images and some heads of a map, (b, H, W, some heads' channels), as a view.
    """

    act: Activation
    heads: int
    window: Sequence[int]
    mode: AttentionMode
    repeat: int

    def chunks(self, *maps: Tensor, size: int, most: int | None = None) -> Iterator[tuple[int, list[Tensor]]]:
        """The heads in a chunk, and that chunk of each map; ``size`` elements of the widest map belong to an image.

        Shape: maps (B, H, W, any C) -> chunks of (b, H, W, C).
        """
        most = most or CHUNK
        images = max(1, most // size)
        some = self.heads if size <= most else max(1, most * self.heads // size)
        for i in range(0, len(maps[0]), images):
            for j in range(0, self.heads, some):
                count, widths = min(some, self.heads - j), [x.shape[-1] // self.heads for x in maps]
                yield count, [
                    x[i : i + images, :, :, j * width : (j + count) * width]
                    for x, width in zip(maps, widths, strict=True)
                ]

    def views(self, x: Tensor, heads: int) -> list[Tensor]:
        """The windows of each partition. Shape: (b, H, W, C) -> P x (b, n, m, heads, h, w, C / heads)."""
        splits = [part.split(x, self.window).unflatten(-1, (heads, -1)) for part in PARTITIONS[self.mode]]
        return [split.permute(0, 1, 2, 5, 3, 4, 6) for split in splits]

    def gather(self, x: Tensor, heads: int) -> Tensor:
        """The windows of all partitions as matrices. Shape: (b, H, W, C) -> (N, h w, C / heads)."""
        return torch.stack(self.views(x, heads)).view(-1, self.window[0] * self.window[1], x.shape[-1] // heads)

    def scatter(self, matrices: Tensor, out: Tensor, heads: int) -> None:
        """Put back what `gather` took, summed over the partitions. Shape: (N, h w, C / heads) -> out (b, H, W, C)."""
        views = self.views(out, heads)
        for i, (place, share) in enumerate(zip(views, matrices.chunk(len(views)), strict=True)):
            share = share.view(place.shape)
            place.add_(share) if i else place.copy_(share)

    def weigh(self, queries: Tensor, keys: Tensor, out: Tensor) -> None:
        """The attention maps, computed in float32 or better. Shape: 2 x (N, T, d) -> out (N, T, T)."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        logits = torch.bmm(queries.to(dtype) * queries.shape[-1] ** -0.5, keys.to(dtype).mT)
        if out.dtype == dtype:
            torch.softmax(logits, -1, out=out)
        else:
            out.copy_(torch.softmax(logits, -1))

    def maps(self, z: Tensor) -> Tensor:
        """Room for the attention maps of all chunks. Shape: z (B, H, W, M) -> (all N, T, T)."""
        tokens = self.window[0] * self.window[1]
        batch, height, width, _ = z.shape
        number = len(PARTITIONS[self.mode]) * batch * (height // self.window[0]) * (width // self.window[1])
        return z.new_empty((number * self.heads, tokens, tokens))


def forward(qk: Tensor, z: Tensor, layout: Layout, maps: Tensor | None = None) -> Tensor:
    """The result; the attention maps of each chunk are written to ``maps``, one after the other.

    Shape: qk (B, H, W, 2 C), z (B, H, W, M) -> (B, H, W, M).
    """
    q, k = qk.chunk(2, dim=-1)  # 2 x (B, H, W, C)
    out, most, done = torch.empty(z.shape, dtype=z.dtype), FROZEN_CHUNK if maps is None else CHUNK, 0
    for heads, (qs, ks, zs, outs) in layout.chunks(q, k, z, out, size=z[0].numel(), most=most):
        queries, keys = layout.gather(qs, heads), layout.gather(ks, heads)  # (N, T, d)
        count, tokens, _ = queries.shape
        weights = z.new_empty((count, tokens, tokens)) if maps is None else maps[done : done + count]
        layout.weigh(queries, keys, weights)
        weights, done = layout.repeat * weights if layout.repeat != 1 else weights, done + count
        values = layout.gather(activate(zs, layout.act), heads)  # (N, T, e)
        layout.scatter(torch.bmm(weights, values), outs, heads)
    return out


def backward(grad: Tensor, qk: Tensor, z: Tensor, maps: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The gradients of ``qk`` and ``z``. Shape: grad as the result (B, H, W, M); gradients as their tensors."""
    grad_qk, grad_z, done = torch.empty(qk.shape, dtype=qk.dtype), torch.empty(z.shape, dtype=z.dtype), 0
    halves = *qk.chunk(2, dim=-1), *grad_qk.chunk(2, dim=-1)  # 4 x (B, H, W, C)
    scale = (halves[0].shape[-1] // layout.heads) ** -0.5
    for heads, (qs, ks, grad_qs, grad_ks, zs, gs, grad_zs) in layout.chunks(
        *halves, z, grad, grad_z, size=z[0].numel()
    ):
        outer = layout.gather(gs, heads)  # (N, T, e)
        weights, done = maps[done : done + len(outer)], done + len(outer)
        outer = layout.repeat * outer if layout.repeat != 1 else outer
        values = layout.gather(activate(zs, layout.act), heads)  # (N, T, e)
        grad_weights = torch.bmm(outer, values.mT)  # (N, T, T)
        layout.scatter(torch.bmm(weights.mT, outer), grad_zs, heads)
        grad_zs.copy_(activate_backward(grad_zs, zs, layout.act))
        grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scale)
        layout.scatter(torch.bmm(grad_logits, layout.gather(ks, heads)), grad_qs, heads)
        layout.scatter(torch.bmm(grad_logits.mT, layout.gather(qs, heads)), grad_ks, heads)
    return grad_qk, grad_z


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qk: Tensor, z: Tensor, layout: Layout) -> Tensor:
        maps, ctx.layout = layout.maps(z), layout
        ctx.save_for_backward(qk, z, maps)
        with torch.autocast("cpu", enabled=False):
            return forward(qk, z, layout, maps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors, ctx.layout), None


OPTIONS = "str act, int heads, int[] window, str mode, int repeat"


@torch.library.custom_op(
    "d_emo::window_attention_on_cpu", mutates_args=(),
    schema=f"(Tensor qk, Tensor z, {OPTIONS}, bool keep) -> (Tensor, Tensor)",
)  # fmt: skip
def _attend(qk: Tensor, z: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The result and, with ``keep``, the attention maps, which the backward pass needs; otherwise no element."""
    *options, keep = options
    layout = Layout(*options)
    maps = layout.maps(z) if keep else None
    with torch.autocast("cpu", enabled=False):
        return forward(qk, z, layout, maps), z.new_empty(0) if maps is None else maps


@_attend.register_fake
def _(qk: Tensor, z: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    *options, keep = options
    return z.new_empty(z.shape), Layout(*options).maps(z) if keep else z.new_empty(0)


@torch.library.custom_op(
    "d_emo::window_attention_on_cpu_backward", mutates_args=(),
    schema=f"(Tensor grad, Tensor qk, Tensor z, Tensor maps, {OPTIONS}) -> (Tensor, Tensor)",
)  # fmt: skip
def _attend_backward(grad: Tensor, qk: Tensor, z: Tensor, maps: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return backward(grad, qk, z, maps, Layout(*options))


@_attend_backward.register_fake
def _(grad: Tensor, qk: Tensor, z: Tensor, maps: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return qk.new_empty(qk.shape), z.new_empty(z.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qk, z, *ctx.options, _ = inputs
    ctx.set_materialize_grads(False)  # of the maps, which nobody asks for
    ctx.save_for_backward(qk, z, output[1])


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = (None, None) if grad is None else _attend_backward(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (len(ctx.options) + 1)


_attend.register_autograd(_gradients, setup_context=_keep)
