"""What all data sets have in common: their interface, and the step between bytes and numbers in [-1, 1]."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from d_emo.data.reading import Reading
from d_emo.errors import InputError


class ClassImages(Dataset, ABC):
    """What the loaders below have in common.

    Attributes:
        name: Data set name, written into snapshots.
        class_names: One name per class id.
        image_size: Side of the square images in pixels.
        flip: Whether images are mirrored at random; a mirrored image then still belongs to its class.
        reading: How stored pictures become RGB; None where none are read.
        left_out: A sentence on the files beside them that are no images, if there are some.
        sequential: Whether images can be had in order only, so that nothing can be trained on them at random.
        sorted_names: Whether the ids follow from the names, so that 0.1.0 had them in the order of text.
    """

    name: str
    class_names: list[str]
    image_size: int
    flip: bool = False
    reading: Reading | None = None
    left_out: str = ""
    sequential: bool = False
    sorted_names: bool = False

    @abstractmethod
    def label(self, index: int) -> int:
        """Class id of image ``index``, without loading it."""

    def source(self, index: int) -> Path | BytesIO | None:
        """The file of image ``index``, or its content; None where there is none."""
        return None

    def origin(self, index: int) -> str:
        """Where image ``index`` comes from, for messages about it."""
        return f"image {index} of {self.name}"

    def remarks(self, count: Callable[[torch.Tensor], Any] = torch.count_nonzero) -> list[str]:
        """Lines on what was done to images on the way, for the end of a run; ``count`` counts over all processes."""
        return []


class Relabelled(ClassImages):
    """Another data set whose classes have other ids.

    Args:
        images: The data set, or latents.
        ids: The new id of each of its classes.
        class_names: One name per new id.
    """

    def __init__(self, images: ClassImages, ids: Sequence[int], class_names: list[str]):
        self.images, self.ids, self.name, self.class_names = images, ids, images.name, class_names
        self.image_size, self.flip, self.reading = images.image_size, images.flip, images.reading
        self.left_out, self.seed = images.left_out, getattr(images, "seed", 0)
        self.sequential = getattr(images, "sequential", False)

    def __len__(self) -> int:
        return len(self.images)

    def label(self, index: int) -> int:
        return self.ids[self.images.label(index)]

    def source(self, index: int) -> Path | BytesIO | None:
        return self.images.source(index)

    def origin(self, index: int) -> str:
        return self.images.origin(index)

    def remarks(self, count: Callable[[torch.Tensor], Any] = torch.count_nonzero) -> list[str]:
        return self.images.remarks(count)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        values, label = self.images[index]
        return values, self.ids[label]


class OneClass(Relabelled):
    """Another data set with its labels taken away: every image is of class 0."""

    def __init__(self, images: ClassImages):
        super().__init__(images, [0] * len(images.class_names), [images.name])


class Mixture(ClassImages):
    """Two data sets in one, of as many images as the first has, a share of them the second's; its classes come last.

    Args:
        first, second: Of images of the same size.
        share: Of the second, in [0, 1]; its images come again as often as needed.
    """

    def __init__(self, first: ClassImages, second: ClassImages, share: float):
        self.first, self.second, self.share, self.name = first, second, share, first.name
        self.class_names = [*first.class_names, *second.class_names]
        self.image_size, self.flip, self.left_out = first.image_size, first.flip, first.left_out

    def __len__(self) -> int:
        return len(self.first)

    def _at(self, index: int) -> tuple[ClassImages, int, int]:
        """The data set that image ``index`` is of, its index there, and what is added to its label."""
        before = math.floor(index * self.share)
        if math.floor((index + 1) * self.share) > before:
            return self.second, before % len(self.second), len(self.first.class_names)
        return self.first, index, 0

    def label(self, index: int) -> int:
        images, there, more = self._at(index)
        return images.label(there) + more

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        images, there, more = self._at(index)
        values, label = images[there]
        return values, label + more


def in_order_of(images: ClassImages, class_names: Sequence[str]) -> ClassImages | None:
    """The images with the ids that their classes have among ``class_names``; None where these are other names."""
    ours, ids = images.class_names, {name: label for label, name in enumerate(class_names)}
    if list(class_names) == ours:
        return images
    if len(ours) != len(class_names) or len(ids) < len(ours) or ids.keys() != set(ours):
        return None
    return Relabelled(images, [ids[name] for name in ours], list(class_names))


def in_recorded_order(images: ClassImages, recorded: Sequence[str] | None) -> ClassImages:
    """The images with the ids that their classes had when a run began, as its training state records them.

    One of 0.1.0 records none.
    """
    if recorded is None:
        recorded = sorted(images.class_names) if getattr(images, "sorted_names", False) else images.class_names
    return in_order_of(images, recorded) or images


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map images from [-1, 1] to bytes, rounding to nearest.

    Shape: (..., H, W) float -> same, uint8.
    """
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 in [-1, 1]. Shape: (3, H, W)."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.float().div_(127.5).sub_(1)


def check_image_size(image_size: int) -> None:
    """Raise InputError for a size that no data set can serve, below 8 px."""
    if image_size < 8:
        raise InputError(f"`image_size` {image_size} is too small; use at least 8 px")


def split_number(split: str) -> int:
    """0 for train, 1 for test; InputError for another split."""
    if split not in ("train", "test"):
        raise InputError(f"unknown split {split!r}; use train or test")
    return int(split == "test")
