"""Data sets of class-labelled images: Shapes-1000 (drawn on the fly), digits (real scans), image folders, WebDataset's
tar shards and data sets of the library ``datasets``.

Every data set yields ``(image, label)`` with a float32 image of shape (3, H, W) in [-1, 1] and an integer label, and
carries ``name``, ``class_names``, ``image_size`` and ``flip`` (whether a mirrored image keeps its class).
"""

from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from d_emo.config import HeldOutSettings, is_folder
from d_emo.data.augmented import AugmentedFolder, CentreCroppedFolder
from d_emo.data.digits import Digits, MNIST5k
from d_emo.data.folder import ImageFolder
from d_emo.data.hub import HubImages, HubStream
from d_emo.data.images import (
    ClassImages,
    Mixture,
    OneClass,
    Relabelled,
    in_order_of,
    in_recorded_order,
    to_uint8,
)
from d_emo.data.listing import find_splits, is_clutter, list_files, list_folders
from d_emo.data.names import check_class_names
from d_emo.data.reading import AS_VIEWED, Reading, centre_crop, describe_left_out, image_endings, is_image
from d_emo.data.sampler import StepSampler, rows_of
from d_emo.data.shapes import COLOURS, GROUNDS, SHAPES, Shapes1000
from d_emo.data.stored import load_image
from d_emo.data.tar import TarShards
from d_emo.errors import InputError
from d_emo.tables import DATASETS, load

__all__ = [
    "AS_VIEWED", "COLOURS", "GROUNDS", "SHAPES", "AugmentedFolder", "CentreCroppedFolder", "ClassImages", "Digits",
    "HubImages", "HubStream", "ImageFolder", "MNIST5k", "Mixture", "OneClass", "Reading", "Relabelled", "Shapes1000",
    "StepSampler", "TarShards", "centre_crop", "describe_left_out", "find_splits", "image_endings", "in_order_of",
    "in_recorded_order", "is_clutter", "is_image", "list_files", "list_folders", "load_image", "matched",
    "open_dataset", "open_held_out", "rows_of", "spread", "to_uint8",
]

def open_dataset(
    *, dataset: str, data_dir: str | None, image_size: int, split: str = "train", seed: int = 0,
    num_images: int | None = None, skip_corrupt: bool | None = None, one_class: bool = False, sequential: bool = False,
    crop_share: float | None = None, reading: Reading = AS_VIEWED, flip: bool | None = None,
) -> ClassImages:
    """Open the data set that the settings name; with ``one_class``, as one class, for unconditional training.

    ``skip_corrupt`` is that of `StoredImages`; left out, no message speaks of ``--skip-corrupt``.
    With ``crop_share`` the images of a folder are cropped as classifiers are measured, see `CentreCroppedFolder`.
    ``flip`` says whether images are mirrored in training; left out, the data set does.

    Raises:
        InputError: Unknown data set; one that can only be read in order, unless ``sequential``; one that must not be
            mirrored, with ``flip``; or see the data sets.
    """
    if data_dir is not None:
        options = {"skip_corrupt": skip_corrupt, "one_class": one_class, "crop_share": crop_share, "reading": reading}
        images = open_source(data_dir, image_size, **options)
        if images.sequential and not sequential:
            raise InputError(
                f"{data_dir} is a stream, whose images cannot be had in random order; encode it first "
                "(`d-emo encode --data-dir ... --output DIR`) and train with `latents` DIR"
            )
        images.flip = images.flip if flip is None else flip
        return OneClass(images) if one_class and len(images.class_names) > 1 else images
    row = DATASETS[dataset]
    if flip and not row.mirrors:
        raise InputError(f"`flip`: a mirror image of {row.title} is of no class; leave it away")
    drawn = {"seed": seed, "num_images": num_images} if row.drawn else {}
    given = {name: value for name, value in drawn.items() if value is not None}
    images = load(row.images)(image_size, split=split, **given)
    check_class_names(images.class_names)
    images.flip = images.flip if flip is None else flip
    return OneClass(images) if one_class else images


def open_source(
    data_dir: str, image_size: int, *, skip_corrupt: bool | None = None, one_class: bool = False,
    crop_share: float | None = None, reading: Reading = AS_VIEWED,
) -> ClassImages:
    """Open what ``data_dir`` names: an image folder, ``wds:SHARDS`` or ``hf:DATASET``; else InputError."""
    scheme, _, rest = data_dir.partition(":")
    stored: dict[str, Any] = {"skip_corrupt": skip_corrupt, "reading": reading}
    if is_folder(data_dir) and crop_share is not None:
        return CentreCroppedFolder(data_dir, image_size, crop_share=crop_share, **stored)
    if is_folder(data_dir):
        return ImageFolder(data_dir, image_size, one_class=one_class, **stored)
    source, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    known = {"class_names", "first_class", "label"}
    known |= {"config", "split", "image", "streaming", "length"} if scheme == "hf" else set()
    if not source or options.keys() - known:
        wrong = ", ".join(sorted(options.keys() - known)) or "no name"
        raise InputError(f"{data_dir}: {wrong} is not understood; after ? it takes {', '.join(sorted(known))}")
    for name in {"first_class", "length"} & options.keys():
        if not options[name].isdecimal():
            raise InputError(f"{data_dir}: {name} takes a number")
        options[name] = int(options[name])
    if scheme == "wds":
        return TarShards(source, image_size, **stored, **options)
    streaming, length = options.pop("streaming", "false"), options.pop("length", None)
    if streaming not in ("true", "false"):
        raise InputError(f"{data_dir}: streaming takes true or false")
    if streaming == "true":
        return HubStream(source, image_size, length=length, **stored, **options)
    return HubImages(source, image_size, **stored, **options)


def open_held_out(
    settings: HeldOutSettings, class_names: list[str], *, one_class: bool = False,
    crop_share: float | None = None,
) -> ClassImages:
    """Open the images to validate on; InputError if there are none, or they have other classes."""
    own_data = settings.data_dir or getattr(settings, "latents", None)
    if own_data is not None and settings.validate_dir is None:
        raise InputError("`validate_every` needs held-out images: give their folder as `validate_dir`")
    held_out = open_dataset(
        dataset=settings.dataset, data_dir=own_data and settings.validate_dir, split="test",
        num_images=DATASETS[settings.dataset].held_out, image_size=settings.image_size,
        skip_corrupt=settings.skip_corrupt, one_class=one_class, crop_share=crop_share,
        reading=Reading.of(settings),
    )
    return held_out if one_class else matched(held_out, class_names, settings.validate_dir)


def matched(held_out: ClassImages, class_names: list[str], place: str | None) -> ClassImages:
    """Held-out data with the ids of the classes that are trained; InputError, naming their place, for other classes."""
    ordered = in_order_of(held_out, class_names)
    if ordered is None:
        odd = ", ".join(sorted(set(held_out.class_names) ^ set(class_names))[:3])
        raise InputError(
            f"the {len(held_out.class_names)} classes of {place} are not the {len(class_names)} that "
            f"are trained{f'; only one of the two has {odd}' if odd else ', and some have the same name'}"
        )
    return ordered


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices, one drawn from each of as many equal parts of ``range(length)``, always the same ones.

    Equal steps instead would meet few classes, or one, where the labels of a data set go round.
    """
    edges = np.arange(min(count, length) + 1) * length // min(count, length)
    draws = np.random.Generator(np.random.Philox(key=length)).random(len(edges) - 1)
    return (edges[:-1] + (draws * np.diff(edges)).astype(int)).tolist()
