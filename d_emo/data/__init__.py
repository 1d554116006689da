"""Data sets of class-labelled images: Shapes-1000 (drawn on the fly), digits (real scans), image folders.

Every data set yields ``(image, label)`` with a float32 image of shape (3, H, W) in [-1, 1] and an integer label, and
carries ``name``, ``class_names``, ``image_size`` and ``flip`` (whether a mirrored image keeps its class).
"""

from __future__ import annotations

from d_emo.config import InputError
from d_emo.data.augmented import AugmentedFolder, CentreCroppedFolder
from d_emo.data.digits import Digits
from d_emo.data.folder import IMAGE_SUFFIXES, ImageFolder, centre_crop, load_image
from d_emo.data.images import ClassImages, load_uint8, to_uint8
from d_emo.data.sampler import StepSampler
from d_emo.data.shapes import COLOURS, GROUNDS, SHAPES, Shapes1000

__all__ = [
    "AugmentedFolder", "CentreCroppedFolder",
    "COLOURS", "GROUNDS", "IMAGE_SUFFIXES", "SHAPES", "ClassImages", "Digits", "ImageFolder", "Shapes1000",
    "StepSampler", "centre_crop", "load_image", "load_uint8", "open_dataset", "to_uint8",
]


def open_dataset(
    *, dataset: str, data_dir: str | None, image_size: int, split: str = "train", seed: int = 0,
    num_images: int | None = None, skip_corrupt: bool = False,
) -> ClassImages:
    """Open the data set that the settings name.

    Raises:
        InputError: Unknown data set, or see the data sets themselves.
    """
    if data_dir is not None:
        return ImageFolder(data_dir, image_size, skip_corrupt=skip_corrupt)
    if dataset == "shapes":
        extra = {} if num_images is None else {"num_images": num_images}
        return Shapes1000(image_size, split=split, seed=seed, **extra)
    if dataset == "digits":
        return Digits(image_size, split=split)
    raise InputError(f"unknown data set {dataset!r}; known are shapes and digits, or give --data-dir")
