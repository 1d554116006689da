"""Images of any size, window by window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from d_emo.errors import InputError

AT_ONCE = 4
"""Windows that go through the network together."""


@dataclass(frozen=True)
class Windows:
    """Square windows over an image, and how the logits of those that overlap become one.

    Args:
        size: Side of a window in pixels.
        stride: Pixels from a window to the next, at most ``size``; the last of a row or column ends with the image.
        blend: "mean" of the logits that a pixel has; "gaussian": weighted by a normal distribution around the middle
            of the window, whose standard deviation is an eighth of its side.

    Raises:
        InputError: Windows that leave pixels out.
    """

    size: int
    stride: int
    blend: Literal["mean", "gaussian"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.size:
            raise InputError(f"`stride` must be 1 to {self.size}, the windows' side, not {self.stride}: pixels are "
                             "left out else")  # fmt: skip

    def starts(self, length: int) -> list[int]:
        """First pixels of the windows along a side of so many pixels."""
        last = max(0, length - self.size)
        return [*range(0, last, self.stride), last]

    def weights(self) -> Tensor:
        """What the logits of a window count. Shape: (size, size)."""
        if self.blend == "mean":
            return torch.ones(self.size, self.size)
        along = torch.exp(-0.5 * ((torch.arange(self.size) - (self.size - 1) / 2) / (self.size / 8)) ** 2)
        return along[:, None] * along

    def logits(self, network: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """The logits of an image of any size; one smaller than a window is padded with black, and cut.

        Shape: network (b, 3, size, size) -> (b, num_classes, size, size); image (3, H, W) in [-1, 1]
            -> (num_classes, H, W).
        """
        height, width = image.shape[1:]
        image = F.pad(image, (0, max(0, self.size - width), 0, max(0, self.size - height)), value=-1.0)
        corners = list(product(*map(self.starts, image.shape[1:])))
        weights, total = self.weights().to(image.device), image.new_zeros(image.shape[1:])
        sums: Tensor | None = None
        for first in range(0, len(corners), AT_ONCE):
            places = [(..., slice(top, top + self.size), slice(left, left + self.size))
                      for top, left in corners[first : first + AT_ONCE]]  # fmt: skip
            found = network(torch.stack([image[place] for place in places]))  # (b, num_classes, size, size)
            if sums is None:
                sums = image.new_zeros(found.shape[1], *image.shape[1:])
            for place, each in zip(places, found, strict=True):
                sums[place] += weights * each
                total[place] += weights
        return (sums / total)[:, :height, :width]
