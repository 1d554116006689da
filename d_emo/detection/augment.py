"""Training pictures of detectors: what can be trained on, and the papers' augmentations by torchvision's transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

MEAN = (123.675, 116.28, 103.53)
"""ImageNet's mean colour, around pictures that are zoomed out."""
Augment = Literal["ssd", "flip", "none"]


class ObjectImages(Protocol):
    """A data set of pictures with objects."""

    name: str
    class_names: list[str]

    def __len__(self) -> int: ...

    def source(self, index: int) -> Path | None:
        """The file of picture ``index``; None where there is none."""

    def origin(self, index: int) -> str:
        """Where picture ``index`` comes from, for messages about it."""

    def read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A picture and what is in it.

        Shape: (3, H, W) uint8; boxes (n, 4) as left, top, right, bottom, labels (n,), and where there are some masks
            (n, H, W) uint8, area (n,) and iscrowd (n,) bool.
        """


def trainable(target: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """What a detector can be trained on: boxes are clipped to the picture; crowds and what has no area are left out.

    Shape: see `ObjectImages`.
    """
    boxes = target["boxes"].clone()
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    if "iscrowd" in target:
        keep &= ~target["iscrowd"]
    others = target.keys() & {"labels", "masks", "area"}
    return {"boxes": boxes[keep], **{name: target[name][keep] for name in others}}


def areas_of(target: dict[str, Tensor]) -> Tensor:
    """Areas by which objects are small, medium or large: their own, else of their masks, else of their boxes.

    Shape: see `ObjectImages` -> (n,).
    """
    if "area" in target:
        return target["area"]
    if "masks" in target:
        return target["masks"].sum(dim=(1, 2))
    return (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(dim=1)


def augmentation(augment: Augment, *, flip: bool, side: int | None) -> v2.Transform:
    """The papers' changes to a picture and its objects.

    Args:
        augment: "ssd": zoomed out, cropped around some objects, resized to a square, mirrored, and its colours changed;
            "flip": mirrored only.
        flip: Whether a mirrored picture is still of its classes.
        side: Of the square, in pixels; None leaves the size.
    """
    steps: list[v2.Transform] = []
    if augment == "ssd":
        steps += [v2.RandomZoomOut({tv_tensors.Image: MEAN, "others": 0}), v2.RandomIoUCrop(),
                  v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]  # fmt: skip
        steps += [v2.Resize((side, side), antialias=True)] if side else []
    if flip and augment != "none":
        steps.append(v2.RandomHorizontalFlip())
    if augment == "ssd":
        steps.append(v2.RandomPhotometricDistort((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)))
    return v2.Compose([*steps, v2.SanitizeBoundingBoxes(), v2.ToPureTensor()])


class TrainingImages(Dataset):
    """Pictures as a detector is trained on them; what is drawn depends on (seed, epoch, index) alone.

    Args:
        images: The pictures.
        change: From `augmentation`.
        first_label: The detector's label of the first class.
        seed: Seed of all draws.
        masks: Whether masks are wanted; to change them takes time.
    """

    def __init__(
        self, images: ObjectImages, change: v2.Transform, *, first_label: int, seed: int, masks: bool = True
    ):
        self.images, self.change, self.first_label, self.seed = images, change, first_label, seed
        self.masks = masks
        self.class_names = images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def source(self, index: int) -> Path | None:
        """The file of picture ``index``; None where there is none."""
        return self.images.source(index)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = self.images.read(int(index))
        size = tuple(image.shape[1:])
        target = trainable(target, *size)
        wrapped: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size),
            "labels": target["labels"] + self.first_label,
        }
        if self.masks and "masks" in target:
            wrapped["masks"] = tv_tensors.Mask(target["masks"])
        words = np.random.SeedSequence([self.seed, getattr(index, "epoch", 0), int(index)]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(words[0] >> 1))  # torch.manual_seed asks every kind of device
            image, changed = self.change(tv_tensors.Image(image), wrapped)
        return image.float() / 255, changed

    @staticmethod
    def collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> list[Any]:
        """Pictures and targets of a batch, as torchvision's detectors take them. Shape: see `ObjectImages`."""
        return [[image for image, _ in items], [target for _, target in items]]
