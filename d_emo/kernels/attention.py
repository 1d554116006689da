"""Attention inside the windows of a map.

    out = sum over the partitions of  merge(softmax(q k^T / sqrt(d)) act(z)),  q, k and act(z) split into windows

The plain form stacks the windows of all partitions and calls the library's attention once. On a CPU the library has no
fused kernel for a value wider than the query, and its general form copies each operand once more, scales two of them,
looks for rows of minus infinity and, in bfloat16, does all of it in float32.

On an NVIDIA GPU it is one kernel in each direction, which gathers nothing: see `d_emo.kernels.gpu.attention`.

The CPU form gathers each operand once, in the order that the products want, for a few images or heads at a time, so
that the gathered windows stay in the cache and their memory is used again. Its gradient keeps the attention maps and
the value before the activation, and makes everything else anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.activation import Activation, activate, activate_backward
from d_emo.kernels.choice import compiles_for_cpu, is_plain, lowered, uses_triton

CHUNK = 2**20
"""Elements of the value that are gathered at a time: 4 MB in float32, for each partition."""

FROZEN_CHUNK = 2**18
"""The same without a gradient, where nothing of a chunk is kept: 1 MB in float32."""


class Partition(Protocol):
    """Cuts a map into windows (``split``, a view) and puts windows back (``merge``).

    Attributes:
        kind: "near" or "far", the kinds that the GPU's kernel knows.
    """

    kind: ClassVar[str]

    @staticmethod
    def split(x: Tensor, window: tuple[int, int]) -> Tensor: ...

    @staticmethod
    def merge(windows: Tensor) -> Tensor: ...


def window_attention(
    q: Tensor, k: Tensor, z: Tensor, *, act: Activation, heads: int, window: tuple[int, int],
    partitions: Sequence[type[Partition]], repeat: int = 1,
) -> Tensor:  # fmt: skip
    """Attention within the windows of every partition, summed over the partitions and multiplied by ``repeat``.

    Args:
        q, k: queries and keys.
        z: the value before its activation.
        act: of the value.
        heads: that the channels are divided among.
        window: height and width of a window; divides the map.
        partitions: of the map.
        repeat: factor of the result, for equal partitions that are computed once.

    Shape: q, k (B, H, W, C), z (B, H, W, M) -> (B, H, W, M).
    """
    if uses_triton(q, k, z):
        from d_emo.kernels.gpu import attention as gpu

        operands = lowered(q, k, z)
        if gpu.fits(*operands, window, partitions):
            return gpu.window_attention(
                *operands, act=act, heads=heads, window=window, partitions=partitions, repeat=repeat
            )
    if compiles_for_cpu(z):
        return joinable_window_attention(q, k, activate(z, act), heads, window, partitions, repeat)
    if is_plain() or z.device.type != "cpu":
        return plain_window_attention(q, k, activate(z, act), heads, window, partitions, repeat)
    layout, (q, k, z) = Layout(heads, window, tuple(partitions), repeat, act), lowered(q, k, z)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, z)):
        return _WindowAttention.apply(q, k, z, layout)
    with torch.autocast("cpu", enabled=False):
        return forward(q, k, z, layout)


def plain_window_attention(
    q: Tensor, k: Tensor, value: Tensor, heads: int, window: tuple[int, int], partitions: Sequence[type[Partition]],
    repeat: int,
) -> Tensor:  # fmt: skip
    """The plain form of `window_attention`, after the activation."""
    value = repeat * value if repeat != 1 else value
    windows = [torch.stack([p.split(x, window) for p in partitions]) for x in (q, k, value)]
    parts, batch, n, m, h, w, _ = windows[0].shape  # each (P, B, n, m, h, w, C or M)
    operands = [
        x.reshape(parts * batch * n * m, h * w, heads, -1).transpose(1, 2) for x in windows
    ]  # each (P B n m, heads, h w, head width)
    mixed = F.scaled_dot_product_attention(*operands)  # scale is (query head width)^-1/2
    mixed = mixed.transpose(1, 2).reshape(parts, batch, n, m, h, w, -1)  # (P, B, n, m, h, w, M)
    merged = [p.merge(x) for p, x in zip(partitions, mixed.unbind(), strict=True)]  # P x (B, H, W, M)
    return functools.reduce(torch.add, merged)  # (B, H, W, M)


def joinable_window_attention(
    q: Tensor, k: Tensor, value: Tensor, heads: int, window: tuple[int, int], partitions: Sequence[type[Partition]],
    repeat: int,
) -> Tensor:  # fmt: skip
    """`plain_window_attention` in single steps, partition by partition, which the compiler can join with others."""

    def windows(x: Tensor, part: type[Partition]) -> Tensor:
        """Shape: (B, H, W, C) -> (B, n, m, heads, h w, C / heads)."""
        return part.split(x, window).flatten(3, 4).unflatten(-1, (heads, -1)).transpose(3, 4)

    merged = []
    for part in partitions:
        queries, keys, values = (windows(x, part) for x in (q, k, value))
        weights = torch.softmax(queries @ keys.mT * queries.shape[-1] ** -0.5, -1)  # (B, n, m, heads, h w, h w)
        mixed = (weights @ values).transpose(3, 4).flatten(4)  # (B, n, m, h w, M)
        merged.append(part.merge(mixed.unflatten(3, window)))
    total = functools.reduce(torch.add, merged)
    return repeat * total if repeat != 1 else total


@dataclass(frozen=True)
class Layout:
    """How maps are cut into batches of matrices; see `window_attention` for the fields.

    A chunk is some images and some heads of a map, (b, H, W, some heads' channels), as a view.
    """

    heads: int
    window: tuple[int, int]
    partitions: tuple[type[Partition], ...]
    repeat: int
    act: Activation

    def chunks(self, *maps: Tensor, size: int, most: int | None = None) -> Iterator[tuple[int, list[Tensor]]]:
        """The heads in a chunk, and that chunk of each map; ``size`` elements of the widest map belong to an image."""
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
        splits = [part.split(x, self.window).unflatten(-1, (heads, -1)) for part in self.partitions]
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

    def weights(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The attention maps, in float32 or better. Shape: 2 x (N, T, d) -> (N, T, T)."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        logits = torch.bmm(queries.to(dtype) * queries.shape[-1] ** -0.5, keys.to(dtype).mT)
        return torch.softmax(logits, -1)


def forward(q: Tensor, k: Tensor, z: Tensor, layout: Layout, maps: list[Tensor] | None = None) -> Tensor:
    """The result; the attention maps of each chunk are appended to ``maps``."""
    out, most = torch.empty(z.shape, dtype=z.dtype), FROZEN_CHUNK if maps is None else CHUNK
    for heads, (qs, ks, zs, outs) in layout.chunks(q, k, z, out, size=z[0].numel(), most=most):
        weights = layout.weights(layout.gather(qs, heads), layout.gather(ks, heads)).to(z.dtype)  # (N, T, T)
        if maps is not None:
            maps.append(weights)
        weights = layout.repeat * weights if layout.repeat != 1 else weights
        values = layout.gather(activate(zs, layout.act), heads)  # (N, T, e)
        layout.scatter(torch.bmm(weights, values), outs, heads)
    return out


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, z: Tensor, layout: Layout) -> Tensor:
        maps: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            out = forward(q, k, z, layout, maps)
        ctx.save_for_backward(q, k, z, *maps)
        ctx.layout = layout
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, z, *maps = ctx.saved_tensors
        layout: Layout = ctx.layout
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, z)]
        chunks = layout.chunks(q, k, z, grad, *grads, size=z[0].numel())
        scale = (q.shape[-1] // layout.heads) ** -0.5
        for weights, (heads, (qs, ks, zs, gs, grad_q, grad_k, grad_z)) in zip(maps, chunks, strict=True):
            outer = layout.gather(gs, heads)  # (N, T, e)
            outer = layout.repeat * outer if layout.repeat != 1 else outer
            values = layout.gather(activate(zs, layout.act), heads)  # (N, T, e)
            grad_weights = torch.bmm(outer, values.mT)  # (N, T, T)
            grad_values = torch.bmm(weights.mT, outer)  # (N, T, e)
            layout.scatter(grad_values, grad_z, heads)
            grad_z.copy_(activate_backward(grad_z, zs, layout.act))
            grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scale)
            layout.scatter(torch.bmm(grad_logits, layout.gather(ks, heads)), grad_q, heads)
            layout.scatter(torch.bmm(grad_logits.mT, layout.gather(qs, heads)), grad_k, heads)
        return *grads, None
