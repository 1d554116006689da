"""Data sets of class-labelled images: Shapes-1000 (drawn on the fly), digits (real scans), image folders.

Every data set yields ``(image, label)`` with a float32 image of shape (3, H, W) in [-1, 1] and an integer label, and
carries ``name``, ``class_names``, ``image_size`` and ``flip`` (whether a mirrored image keeps its class).
"""

from __future__ import annotations

from d_emo.config import DataSettings, InputError
from d_emo.data.digits import Digits
from d_emo.data.folder import IMAGE_SUFFIXES, ImageFolder, centre_crop, load_image
from d_emo.data.images import ClassImages, OneClass, load_uint8, to_uint8
from d_emo.data.sampler import StepSampler
from d_emo.data.shapes import COLOURS, GROUNDS, SHAPES, Shapes1000

__all__ = [
    "COLOURS", "GROUNDS", "IMAGE_SUFFIXES", "SHAPES", "ClassImages", "Digits", "ImageFolder", "OneClass",
    "Shapes1000", "StepSampler", "centre_crop", "load_image", "load_uint8", "open_dataset", "open_held_out", "spread",
    "to_uint8",
]


def open_dataset(
    *, dataset: str, data_dir: str | None, image_size: int, split: str = "train", seed: int = 0,
    num_images: int | None = None, skip_corrupt: bool = False, one_class: bool = False,
) -> ClassImages:
    """Open the data set that the settings name; with ``one_class``, as one class, for unconditional training.

    Raises:
        InputError: Unknown data set, or see the data sets themselves.
    """
    if data_dir is not None:
        return ImageFolder(data_dir, image_size, skip_corrupt=skip_corrupt, one_class=one_class)
    if one_class:
        known = {"dataset": dataset, "image_size": image_size, "split": split, "seed": seed, "num_images": num_images}
        return OneClass(open_dataset(data_dir=None, **known))
    if dataset == "shapes":
        extra = {} if num_images is None else {"num_images": num_images}
        return Shapes1000(image_size, split=split, seed=seed, **extra)
    if dataset == "digits":
        return Digits(image_size, split=split)
    raise InputError(f"unknown data set {dataset!r}; known are shapes and digits, or give --data-dir")


def open_held_out(settings: DataSettings, class_names: list[str], *, one_class: bool = False) -> ClassImages:
    """Open the images to validate on.

    Raises:
        InputError: There are none, or they have other classes.
    """
    if settings.data_dir is not None and settings.validate_dir is None:
        raise InputError("--validate-every needs held-out images: give their folder as --validate-dir")
    held_out = open_dataset(
        dataset=settings.dataset, data_dir=settings.data_dir and settings.validate_dir, split="test",
        image_size=settings.image_size, skip_corrupt=settings.skip_corrupt, one_class=one_class,
    )
    if held_out.class_names != class_names and not one_class:
        raise InputError(
            f"the {len(held_out.class_names)} classes of {settings.validate_dir} are not the {len(class_names)} that "
            "are trained"
        )
    return held_out


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices, evenly spread over ``range(length)``."""
    count = min(count, length)
    return [index * length // count for index in range(count)]
