"""Images with a class for every pixel: folders of PNG masks, and built-in pictures of objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from d_emo.data.listing import find_splits, list_files, list_folders
from d_emo.data.reading import Reading, is_image, naming
from d_emo.errors import InputError
from d_emo.tables import SCENES, load

IGNORED = 255
"""The class of pixels that count for nothing."""
MOST_CLASSES = IGNORED - 1
_UNKNOWN = 254


class LabelledImages(Dataset, ABC):
    """Images and the class of each of their pixels.

    Attributes:
        name: Written into snapshots.
        class_names: One name per class.
        flip: Whether a mirrored image still has the classes that it had.
    """

    name: str
    class_names: list[str]
    flip: bool = True

    @abstractmethod
    def __len__(self) -> int: ...

    def source(self, index: int) -> Path | None:
        """The file of image ``index``; None where there is none."""
        return None

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its classes, `IGNORED` where there is none. Shape: (3, H, W), (H, W), both uint8."""


class LabelledScenes(LabelledImages):
    """Built-in pictures of objects: the ground is class 0, and an object of class c is c + 1 here."""

    def __init__(
        self, image_size: int, *, num_images: int, split: str = "train", seed: int = 0, dataset: str = "digit-scenes"
    ):
        row = SCENES[dataset]
        self.scenes = load(row.scenes)(image_size, num_images=num_images, split=split, seed=seed)
        self.name, self.flip = row.name, row.mirrors
        self.class_names = ["background", *self.scenes.class_names]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, objects = self.scenes.read(index)
        classes = objects["masks"] * (objects["labels"] + 1)[:, None, None].to(torch.uint8)
        return pixels, torch.cat([torch.zeros_like(pixels[:1]), classes]).amax(dim=0)


@dataclass(frozen=True)
class Layout:
    """Where a folder keeps images and masks.

    Attributes:
        images, masks: Sub-folders; below them both have the same paths but for the ending of the name.
        image_ending, mask_ending: Ends of names that are exchanged, without the kind of file.
        classes: Names of the classes; empty: see `class_names_of`.
        ids: Class of each value of a mask. Default: the value itself.
    """

    images: str
    masks: str
    image_ending: str = ""
    mask_ending: str = ""
    classes: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None


CITYSCAPES = tuple(
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck "
    "bus train motorcycle bicycle".split()
)
_EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # in *_labelIds.png
_TRAIN_IDS = tuple(_EVALUATED.index(value) if value in _EVALUATED else IGNORED for value in range(34))
LAYOUTS = {
    "Cityscapes": Layout("leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_labelTrainIds", CITYSCAPES),
    "Cityscapes' labelIds": Layout(
        "leftImg8bit", "gtFine", "_leftImg8bit", "_gtFine_labelIds", CITYSCAPES, _TRAIN_IDS
    ),
    # A mask's value 0 is what belongs to none of the 150 classes.
    "ADE20K": Layout("images", "annotations", ids=(IGNORED, *range(150))),
    **{name: Layout("images", name) for name in ("masks", "labels")},
}
"""Layouts by name, the first that fits is taken."""


class MaskFolder(LabelledImages):
    """Images of a folder with a PNG of class ids for each, in the layout of ADE20K, of Cityscapes, or a simple one.

    ADE20K: ``images/training/*.jpg`` and ``annotations/training/*.png``, 150 classes. Cityscapes:
    ``leftImg8bit/train/CITY/*_leftImg8bit.png`` and ``gtFine/train/CITY/*_gtFine_labelTrainIds.png`` (or labelIds), 19
    classes. Simple: ``images/`` and ``masks/`` (or ``labels/``), with sub-folders train and val or without, and
    ``classes.txt``, a name on each line; 255 is ignored. Pixels are taken as they are stored, EXIF's turns left out.

    Args:
        root: The folder.
        held_out: The images to measure on, instead of those to train on.
        background: Colour behind what is transparent.

    Attributes:
        splits: Whether the folder holds out images.

    Raises:
        InputError: No such layout; an image without a mask; no names of classes; nothing held out.
    """

    def __init__(self, root: str | Path, *, held_out: bool = False, background: str = Reading.background):
        self.root, self.name, self.reading = Path(root), Path(root).resolve().name, Reading(False, background)
        self.layout, self.pairs, self.splits = _find(self.root, held_out)
        self.class_names = class_names_of(self.root, self.layout)
        ids = self.layout.ids or range(len(self.class_names))
        self.table = np.full(2**8, _UNKNOWN, dtype=np.uint8)
        self.table[: len(ids)] = ids
        self.table[IGNORED] = IGNORED

    def __len__(self) -> int:
        return len(self.pairs)

    def source(self, index: int) -> Path:
        return self.pairs[index][0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """See `LabelledImages`; InputError for a mask of another size or with values beyond the classes."""
        image, mask = self.pairs[index]
        pixels = np.array(self.reading.read(image, lambda: str(image)))
        with naming(lambda: str(mask)), Image.open(mask) as stored:
            if stored.mode not in ("1", "L", "P", "I;16", "I"):
                raise InputError(f"a mask has one value a pixel, its class, and this is {stored.mode}")
            values = np.asarray(stored).astype(np.int64)
        check_size(mask, values, image, pixels)
        classes = self.table[np.clip(values, 0, IGNORED)]
        beyond = values[(classes == _UNKNOWN) | (values > IGNORED)]
        if beyond.size:
            raise InputError(
                f"the mask {mask} has the value {beyond.min()}, beyond the {len(self.class_names)} classes of "
                f"{self.root} ({IGNORED} is what is ignored)"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(classes)


def check_size(mask: Path, values: np.ndarray, image: Path, pixels: np.ndarray) -> None:
    """Refuse a mask that is not as large as its image.

    Shape: (H, W), (H, W, 3).

    Raises:
        InputError: Both sizes, and the files.
    """
    if values.shape != pixels.shape[:2]:
        shapes = " x ".join(map(str, values.shape[::-1])), " x ".join(map(str, pixels.shape[1::-1]))
        raise InputError(f"the mask {mask} has {shapes[0]} px, and its image {image} {shapes[1]} px")


def class_names_of(root: Path, layout: Layout) -> list[str]:
    """Names of the classes of a folder: its layout's, or those in its ``classes.txt``; ADE20K's may be numbers.

    Raises:
        InputError: There are none, or more than a mask of 8 bits can tell apart.
    """
    if layout.classes:
        return list(layout.classes)
    file = root / "classes.txt"
    if not file.is_file():
        if layout.ids:
            return [f"class {number}" for number in range(1, len(layout.ids))]
        raise InputError(f"{file} is missing: a text file with the name of a class on each line, that of value 0 first")
    names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    wanted = len(layout.ids) - 1 if layout.ids else None
    if wanted not in (None, len(names)) or not 2 <= len(names) <= MOST_CLASSES:
        raise InputError(f"{file} names {len(names)} classes; there must be {wanted or f'2 to {MOST_CLASSES}'}")
    return names


def _find(root: Path, held_out: bool) -> tuple[Layout, list[tuple[Path, Path]], bool]:
    """The layout of a folder, the files of its training or its held-out images, and whether it has both."""
    if not root.is_dir():
        raise InputError(f"the data folder {root} does not exist")
    for layout in LAYOUTS.values():
        images, masks = root / layout.images, root / layout.masks
        if not (images.is_dir() and masks.is_dir()):
            continue
        splits = find_splits(list_folders(images))
        if held_out and not (splits and splits[1]):
            raise InputError(f"{images} has no folder val (or validation), so nothing is held out; give `validate_dir`")
        chosen = [images] if splits is None else splits[held_out][:1]
        pairs = [pair for each in chosen for pair in _pairs(layout, root, list_files(each))]
        if pairs and not (layout.mask_ending and not any(mask.is_file() for _, mask in pairs)):
            _check(pairs)
            return layout, pairs, splits is not None and bool(splits[1])
    raise InputError(
        f"{root} holds no images with masks: it needs images/ and masks/ (or labels/), with PNGs of the same names, or "
        "the layout of ADE20K (images/training, annotations/training) or Cityscapes (leftImg8bit/train, gtFine/train)"
    )


def _pairs(layout: Layout, root: Path, files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The images among some files, each with the place where its mask has to be."""
    base, pairs = root / layout.images, []
    for file in files:
        if is_image(file) and file.stem.endswith(layout.image_ending):
            stem = file.stem.removesuffix(layout.image_ending) if layout.image_ending else file.stem
            name = f"{stem}{layout.mask_ending}.png"
            pairs.append((file, root / layout.masks / file.relative_to(base).with_name(name)))
    return pairs


def _check(pairs: Sequence[tuple[Path, Path]]) -> None:
    missing = [pair for pair in pairs if not pair[1].is_file()]
    if missing:
        image, mask = missing[0]
        others = f" (nor have {len(missing) - 1:,} others theirs)" if len(missing) > 1 else ""
        raise InputError(f"the image {image} has no mask {mask}{others}")
