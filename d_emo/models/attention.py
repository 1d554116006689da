"""Attention inside windows of a feature map, and plain attention over all of it.

Sources: EMOv2 paper, section III (spanning window attention); EMOv1 paper (strided windows, pre-attention).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.kernels import PARTITIONS, AttentionMode
from d_emo.kernels.partitions import is_free
from d_emo.models.layers import sizes

AttentionOrder = Literal["post", "pre"]


@torch.fx.wrap
def pad_to_multiple(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Add zero rows below and zero columns on the right (and frames at the end) until the window divides the map.

    Shape: (B, H, W, C) -> (B, H', W', C) with H' >= H, W' >= W the next multiples of the window; any number of axes.
    """
    # In this form a free size stays simple: torch.export reasons on it for every reshape that follows.
    missing = [(size + side - 1) // side * side - size for size, side in zip(x.shape[1:-1], window, strict=True)]
    if not is_free(x) and not any(missing):
        return x
    return F.pad(x, (0, 0, *(pad for size in reversed(missing) for pad in (0, size))))


@torch.fx.wrap
def crop(x: Tensor, like: Tensor) -> Tensor:
    """What `pad_to_multiple` was given. Shape: (B, H', W', M), like (B, H, W, C) -> (B, H, W, M)."""
    if not is_free(x):
        for axis, wanted in enumerate(like.shape[1:-1], 1):
            if x.shape[axis] != wanted:  # a slice that takes all is an alias to torch.export, which Core ML lacks
                x = x.narrow(axis, 0, wanted)
        return x
    # A slice would be of min(H, H') rows.
    more = [wanted - size for wanted, size in zip(like.shape[1:-1], x.shape[1:-1], strict=True)]
    return F.pad(x, (0, 0, *(pad for size in reversed(more) for pad in (0, size))))


class WindowAttention(nn.Module):
    """Multi-head attention in windows with an expanded value: near, far, or both summed (spanning).

    One map ``softmax(q k^T / sqrt(d))`` of ``dim`` channels weighs a wider value. In the "post" order the value is
    ``act(Wv u)`` and is mixed by the map (EMOv2); in the "pre" order the map mixes ``u`` and ``act(Wv .)`` follows
    (EMOv1). A map that the window does not divide is padded with zeros after the norm, without a mask, as the released
    weights were trained (EMOv2 paper, eq. 1-5).

    Args:
        dim: channels C of the input, of the queries and of the keys.
        value_dim: channels M of the output.
        num_heads: heads; divides ``dim`` and, in the post order, ``value_dim``.
        window_size: tokens per window, one number or (height, width).
        spatial_dims: axes of the map, 2 for images; with 3 the window is (frames, height, width).
        mode: "near", "far" or "spanning".
        order: "post" or "pre".
        act: activation class of the value.

    Attributes:
        merge_equal_partitions: on a map of one window, compute the partitions' common result once (the same sum). Off
            only to count operations as the papers do.

    Shape: (B, H, W, C) -> (B, H, W, M).

    Raises:
        InputError: for a combination that cannot work.
    """

    def __init__(
        self,
        dim: int,
        value_dim: int,
        *,
        num_heads: int,
        window_size: int | tuple[int, ...],
        spatial_dims: int = 2,
        mode: AttentionMode = "spanning",
        order: AttentionOrder = "post",
        act: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        if not isinstance(mode, str) or mode not in PARTITIONS:
            raise InputError(f"Unknown attention_mode {mode!r}; choose one of {', '.join(map(repr, PARTITIONS))}.")
        if order not in ("post", "pre"):
            raise InputError(f"Unknown attention_order {order!r}; choose 'post' or 'pre'.")
        check_heads(dim, num_heads)
        if order == "post" and value_dim % num_heads:
            raise InputError(f"The expanded width {value_dim} is not divisible by {num_heads} heads.")
        self.num_heads, self.mode, self.order = num_heads, mode, order
        self.window = sizes(window_size, "window_size", spatial_dims)
        self.merge_equal_partitions = True
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, value_dim)
        self.act = act()

    def forward(self, u: Tensor, refine: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Eq. 2-4; ``refine`` is done to the value before it is mixed."""
        padded = pad_to_multiple(u, self.window)  # (B, H', W', C)
        if self.order == "pre":
            mixed = self.mix(padded, padded)  # (B, H', W', C)
        elif refine is None:
            mixed = self.mix(padded, padded, self.v, self.act)  # (B, H', W', M)
        else:
            mixed = self.mix(padded, refine(self.value(padded)))  # (B, H', W', M)
        mixed = crop(mixed, u)  # (B, H, W, M or C)
        return mixed if self.order == "post" else self.value(mixed)  # (B, H, W, M)

    def value(self, u: Tensor) -> Tensor:
        """The expanded value ``act(Wv u)``. Shape: (B, H, W, C) -> (B, H, W, M)."""
        return kernels.linear(self.v, u, self.act)

    def mix(self, u: Tensor, x: Tensor, *value: nn.Module) -> Tensor:
        """``softmax(q k^T / sqrt(d))`` of ``u`` weighs ``x``, or what layer and activation make of it, in each window.

        Shape: u (B, H, W, C), x (B, H, W, K), the window divides H and W -> (B, H, W, M).
        """
        return kernels.window_attention(
            self.qk, u, x, *value, heads=self.num_heads, window=self.window, mode=self.mode,
            merge=self.merge_equal_partitions,
        )  # fmt: skip


class SelfAttention(nn.Module):
    """Plain multi-head attention over all tokens of the map, as in DiT.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, u: Tensor) -> Tensor:
        batch, height, width, dim = u.shape
        qkv = kernels.linear(self.qkv, u).view(batch, height * width, 3, self.num_heads, -1)  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # 3 x (B, heads, N, d)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, d)
        return kernels.linear(self.proj, mixed.transpose(1, 2).reshape(batch, height, width, dim))


def check_heads(dim: int, num_heads: int) -> None:
    """Raise InputError unless ``num_heads`` is positive and divides ``dim``."""
    if not isinstance(num_heads, int) or num_heads < 1:
        raise InputError(f"num_heads must be a positive integer, got {num_heads!r}.")
    if dim % num_heads:
        raise InputError(f"{dim} channels cannot be divided among {num_heads} heads; choose a divisor of {dim}.")
