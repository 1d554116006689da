"""The papers' augmentations of images and their masks together: scale, crop, mirror, colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from d_emo.segmentation.images import IGNORED, LabelledImages

COLOURS = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
"""Ranges of the photometric distortion; each of the four is applied half the time."""
_TRIES = 10


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that mixes numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def to_input(image: Tensor) -> Tensor:
    """Bytes to [-1, 1]. Shape: (..., H, W) uint8 -> same, float32."""
    return image.float().div_(127.5).sub_(1)


def shorter_side(image: Tensor, size: int) -> list[int]:
    """Height and width when the shorter side has ``size`` pixels. Shape: image (..., H, W)."""
    scale = size / min(image.shape[-2:])
    return [max(1, round(side * scale)) for side in image.shape[-2:]]


class TrainingCrops(Dataset):
    """Images of other sizes, cropped, mirrored and coloured at random, with their masks.

    What is drawn depends on (seed, epoch, index) alone.

    Args:
        images: What is cropped.
        crop_size: Side of the square crops in pixels.
        scale_range: The shorter side becomes ``crop_size`` times a factor of this range.
        largest_share: Another crop is tried, up to ten times, while one class covers more than this share of it, or
            no class is known; 1 takes one class too.
        flip: Mirror half of the images.
        colours: Distort brightness, contrast, saturation and hue.
        seed: Of all draws.
    """

    def __init__(
        self, images: LabelledImages, crop_size: int, *, scale_range: tuple[float, float] = (0.5, 2.0),
        largest_share: float = 0.75, flip: bool = True, colours: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        self.images, self.crop_size, self.scale_range = images, crop_size, scale_range
        self.largest_share, self.flip, self.seed = largest_share, flip, seed
        self.class_names = images.class_names
        self.colours = v2.RandomPhotometricDistort(**COLOURS) if colours else v2.Identity()

    def __len__(self) -> int:
        return len(self.images)

    def source(self, index: int) -> Path | None:
        """The file of image ``index``; None where there is none."""
        return self.images.source(index)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Shape: (3, crop_size, crop_size) float32 in [-1, 1], (crop_size, crop_size) int64."""
        image, mask = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, getattr(index, "epoch", 0), int(index)))
            low, high = self.scale_range
            size = max(1, round(self.crop_size * (low + (high - low) * torch.rand(()).item())))
            both = TF.resize(tv_tensors.Image(image), shorter_side(image, size)), TF.resize(
                tv_tensors.Mask(mask[None]), shorter_side(mask, size)
            )
            image, mask = self._crop(*both)
            if self.flip and torch.rand(()) < 0.5:
                image, mask = TF.horizontal_flip(image), TF.horizontal_flip(mask)
            image = self.colours(image)
        return to_input(image.as_subclass(Tensor)), mask[0].as_subclass(Tensor).long()

    def _crop(self, image: tv_tensors.Image, mask: tv_tensors.Mask) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        size = self.crop_size
        short = [0, 0, max(0, size - image.shape[-1]), max(0, size - image.shape[-2])]  # right and bottom
        image, mask = TF.pad(image, short), TF.pad(mask, short, fill=IGNORED)
        spare = [side - size + 1 for side in image.shape[-2:]]
        for _ in range(_TRIES):
            top, left = (int(torch.randint(count, ())) for count in spare)
            part = mask[..., top : top + size, left : left + size]
            counts = torch.bincount(part.flatten().long(), minlength=IGNORED)[:IGNORED]
            if 0 < counts.max() <= self.largest_share * counts.sum():
                break
        return TF.crop(image, top, left, size, size), TF.crop(mask, top, left, size, size)
