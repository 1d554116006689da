"""How a map is cut into windows, and put together again."""

import contextlib
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.fx.experimental import _config


class Partition(Protocol):
    """Cuts a map into windows, as a view; what is written into the windows is put back into the map."""

    @staticmethod
    def split(x: Tensor, window: Sequence[int]) -> Tensor:
        """Shape: map (B, H, W, C), window (h, w) -> windows (B, n, m, h, w, C) with n = H / h, m = W / w."""
        ...


class NearPartition:
    """A window is a rectangle of adjacent tokens."""

    @staticmethod
    def split(x: Tensor, window: Sequence[int]) -> Tensor:
        (h, w), (batch, height, width, dim) = window, x.shape
        return x.view(batch, height // h, h, width // w, w, dim).permute(0, 1, 3, 2, 4, 5)


class FarPartition:
    """A window is a grid of tokens that spans the whole map: h x w tokens at strides (H / h, W / w)."""

    @staticmethod
    def split(x: Tensor, window: Sequence[int]) -> Tensor:
        (h, w), (batch, height, width, dim) = window, x.shape
        return x.view(batch, h, height // h, w, width // w, dim).permute(0, 2, 4, 1, 3, 5)


def channels_last(x: Tensor) -> Tensor:
    """A view of a map with its channels first. Shape: (B, C, H, W) -> (B, H, W, C); any number of axes.

    By ``movedim`` only where `torch.fx` traces: torch.onnx.export(dynamo=False) writes it with a wrong permutation.
    """
    return x.movedim(1, -1) if isinstance(x, torch.fx.Proxy) else x.permute(0, *range(2, x.ndim), 1)


def channels_first(x: Tensor) -> Tensor:
    """What undoes `channels_last`. Shape: (B, H, W, C) -> (B, C, H, W); any number of axes."""
    return x.movedim(-1, 1) if isinstance(x, torch.fx.Proxy) else x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def is_free(x: Tensor) -> bool:
    """Whether torch.export looks at a map whose height or width may be any. Shape: x (B, H, W, C)."""
    return not all(isinstance(n, int) for n in x.shape[1:-1])


def any_size(x: Tensor) -> contextlib.AbstractContextManager:
    """For what holds by chance: in torch.export of free sizes, whether an axis is of one element is not asked. Shape:
    x (B, H, W, C)."""
    return _config.patch(backed_size_oblivious=True) if is_free(x) else contextlib.nullcontext()


def regroup(x: Tensor, *shape: int, copy: bool) -> Tensor:
    """``x.reshape(shape)`` of a transposed map; by ``copy`` never a view.

    Whether a view would do depends on the sizes: where they are free, to ask fixes them.

    Shape: any -> ``shape``.
    """
    return (x.clone(memory_format=torch.contiguous_format) if copy else x).reshape(shape)


def gather(x: Tensor, groups: Sequence[int]) -> Tensor:
    """Reorder a map so that the tokens of a far window lie side by side; with the strides as groups it is undone.

    Shape: (B, H, W, C) -> same, copied, by tensors of at most four axes.
    """
    (h, w), (batch, height, width, dim), free = groups, x.shape, is_free(x)
    x = x.reshape(batch, h, height // h, width * dim).transpose(1, 2)
    x = regroup(x, batch * height, w, width // w, dim, copy=free).transpose(1, 2)
    return regroup(x, batch, height, width, dim, copy=free)


def fold(x: Tensor, window: Sequence[int], mode: str) -> Tensor:
    """The first two axes of a map as one, and of its window too, so that the tokens of a window stay together.

    Windows of any number of axes come down to those of two: in a near window the frames of a few rows follow each
    other, in a far one the rows of its frames.

    Shape: (B, T, H, ..., C), window (t, h, ...) -> (B T / t, t H, ..., C), for a window (t h, ...).
    """
    (t, h, *_), (batch, frames, height, *rest) = window, x.shape
    if mode == "near":
        x = x.reshape(batch, frames // t, t, height // h, h, *rest).transpose(2, 3)  # (B, T / t, H / h, t, h, ...)
    else:
        x = x.reshape(batch, t, frames // t, height, *rest).transpose(1, 2)  # (B, T / t, t, H, ...)
    return x.reshape(batch * (frames // t), t * height, *rest)


def unfold(x: Tensor, window: Sequence[int], mode: str, batch: int) -> Tensor:
    """What `fold` was given. Shape: (B T / t, t H, ..., C) -> (B, T, H, ..., C)."""
    (t, h, *_), (_, height, *rest) = window, x.shape
    frames, height = x.shape[0] // batch * t, height // t  # by shape, as len would fix a free batch
    if mode == "near":
        x = x.reshape(batch, frames // t, height // h, t, h, *rest).transpose(2, 3)
    else:
        x = x.reshape(batch, frames // t, t, height, *rest).transpose(1, 2)
    return x.reshape(batch, frames, height, *rest)


AttentionMode = Literal["near", "far", "spanning"]

PARTITIONS: dict[str, tuple[type[Partition], ...]] = {
    "near": (NearPartition,),
    "far": (FarPartition,),
    "spanning": (NearPartition, FarPartition),
}
