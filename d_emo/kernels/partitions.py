"""How a map is cut into windows, and put together again."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor


class Partition(Protocol):
    """Cuts a map into windows (``split``, a view) and puts windows back (``merge``)."""

    @staticmethod
    def split(x: Tensor, window: tuple[int, int]) -> Tensor: ...

    @staticmethod
    def merge(windows: Tensor) -> Tensor: ...


class NearPartition:
    """A window is a rectangle of adjacent tokens.

    Shape: map (B, n * h, m * w, C) <-> windows (B, n, m, h, w, C); ``split`` returns a view.
    """

    @staticmethod
    def split(x: Tensor, window: tuple[int, int]) -> Tensor:
        (h, w), (batch, height, width, dim) = window, x.shape
        return x.view(batch, height // h, h, width // w, w, dim).permute(0, 1, 3, 2, 4, 5)

    @staticmethod
    def merge(windows: Tensor) -> Tensor:
        batch, n, m, h, w, dim = windows.shape
        return windows.permute(0, 1, 3, 2, 4, 5).reshape(batch, n * h, m * w, dim)


class FarPartition:
    """A window is a grid of tokens that spans the whole map: h x w tokens at strides (H / h, W / w).

    Shape: map (B, h * n, w * m, C) <-> windows (B, n, m, h, w, C); ``split`` returns a view.
    """

    @staticmethod
    def split(x: Tensor, window: tuple[int, int]) -> Tensor:
        (h, w), (batch, height, width, dim) = window, x.shape
        return x.view(batch, h, height // h, w, width // w, dim).permute(0, 2, 4, 1, 3, 5)

    @staticmethod
    def merge(windows: Tensor) -> Tensor:
        batch, n, m, h, w, dim = windows.shape
        return windows.permute(0, 3, 1, 4, 2, 5).reshape(batch, h * n, w * m, dim)


AttentionMode = Literal["near", "far", "spanning"]

PARTITIONS: dict[str, tuple[type[Partition], ...]] = {
    "near": (NearPartition,),
    "far": (FarPartition,),
    "spanning": (NearPartition, FarPartition),
}
