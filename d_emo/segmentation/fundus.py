"""Fundus photographs with their vessels, in the folders that HRF and DRIVE are published in, or mmsegmentation's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d_emo.data.listing import list_files
from d_emo.data.reading import Reading, is_image, naming
from d_emo.errors import InputError
from d_emo.segmentation.images import IGNORED, LabelledImages, check_size

LAYOUTS = "HRF (images, manual1) or DRIVE (training/images, training/1st_manual, test)"


class Photograph(NamedTuple):
    """The files of a photograph: itself, its vessels, its field of view if that is there."""

    image: Path
    vessels: Path
    field: Path | None


class FundusFolder(LabelledImages):
    """Fundus photographs and their vessels: the ground is class 0, a vessel class 1.

    HRF: ``images/01_h.jpg``, ``manual1/01_h.tif``, ``mask/01_h_mask.tif``; of each kind (h, g, dr) the first third is
    trained on, five of fifteen as in mmsegmentation, and the rest held out. DRIVE: ``training/images/21_training.tif``,
    ``training/1st_manual/21_manual1.gif``, ``training/mask/21_training_mask.gif``, and the same below ``test``. What
    mmsegmentation's converters make of them, in ``images/training`` and ``annotations/training``, is read too. A mask
    is a vessel from half of its largest possible value on, as some are not quite black and white.

    Args:
        root: The folder.
        held_out: The photographs to measure on, instead of those to train on.
        background: Colour behind what is transparent.
        field_of_view: Ignore the pixels outside the round field of view; the papers count them.

    Attributes:
        splits: Whether photographs are held out.

    Raises:
        InputError: A photograph without its vessels, or without a field of view that is asked for; nothing held out.
    """

    class_names = ["background", "vessel"]

    def __init__(
        self, root: str | Path, *, held_out: bool = False, background: str = Reading.background,
        field_of_view: bool = False,
    ) -> None:  # fmt: skip
        self.root, self.name, self.reading = Path(root), Path(root).resolve().name, Reading(False, background)
        parts, self.field_of_view = _find(self.root), field_of_view
        if parts is None:
            raise InputError(f"{root} is not laid out as {LAYOUTS}, nor as mmsegmentation converts them")
        self.photographs, self.splits = parts[held_out], bool(parts[1])
        if not self.photographs:
            raise InputError(f"{root} holds no photographs to {'measure' if held_out else 'train'} on")
        for image, vessels, field in self.photographs:
            if not vessels.is_file():
                raise InputError(f"the photograph {image} has no vessels {vessels}")
            if field_of_view and (field is None or not field.is_file()):
                raise InputError(f"the photograph {image} has no field of view {field or 'in this layout'}")

    @staticmethod
    def fits(root: str | Path) -> bool:
        """Whether a folder is laid out so."""
        return _find(Path(root)) is not None

    def __len__(self) -> int:
        return len(self.photographs)

    def source(self, index: int) -> Path:
        return self.photographs[index][0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """See `LabelledImages`; InputError for a mask of another size."""
        image, vessels, field = self.photographs[index]
        pixels = np.array(self.reading.read(image, lambda: str(image)))
        classes = _mask(vessels, image, pixels).astype(np.uint8)
        if self.field_of_view:
            classes[~_mask(field, image, pixels)] = IGNORED
        return torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(classes)


def _mask(file: Path, image: Path, pixels: np.ndarray) -> np.ndarray:
    """Where a picture is white. Shape: (H, W) bool."""
    with naming(lambda: str(file)), Image.open(file) as stored:
        values = np.asarray(stored.convert("L"))
    check_size(file, values, image, pixels)
    return values >= (128 if values.max() > 1 else 1)  # mmsegmentation's converters write 0 and 1


def _find(root: Path) -> tuple[list[Photograph], list[Photograph]] | None:
    """The photographs to train on and those held out; None for a folder of another layout."""
    if (root / "images").is_dir() and (root / "manual1").is_dir():
        found = _beside(root / "images", root / "manual1", str, root / "mask", "{}_mask")
        kinds: dict[str, list[Photograph]] = {}
        for each in found:
            kinds.setdefault(each.image.stem.rpartition("_")[2], []).append(each)
        first = {each for kind in kinds.values() for each in kind[: max(1, len(kind) // 3)]}
        return [each for each in found if each in first], [each for each in found if each not in first]
    if (root / "training" / "1st_manual").is_dir():
        parts = []
        for split in ("training", "test"):
            folder = root / split
            manual = folder / "1st_manual"
            there = manual.is_dir()  # newer copies keep those of the test part to themselves
            parts.append(_beside(folder / "images", manual, _numbered, folder / "mask", "{}_mask") if there else [])
        return parts[0], parts[1]
    images, masks = root / "images", root / "annotations"
    if (images / "training").is_dir() and (masks / "training").is_dir():
        names = [file.stem for file in list_files(images) if is_image(file)]
        drive = any(file.stem.endswith("_manual1") for file in list_files(masks))
        if names and (drive or all(re.fullmatch(r"\d+_(h|g|dr)", name) for name in names)):
            parts = [_beside(images / split, masks / split, _numbered if drive else str)
                     for split in ("training", "validation") if (images / split).is_dir()]  # fmt: skip
            return parts[0], parts[1] if len(parts) == 2 else []
    return None


def _numbered(name: str) -> str:
    """DRIVE's name of a mask: "21_manual1" for "21_training" or "21"."""
    return f"{name.partition('_')[0]}_manual1"


def _beside(
    images: Path, masks: Path, stem: Callable[[str], str], fields: Path | None = None, field: str = ""
) -> list[Photograph]:
    """The photographs of a folder with the masks of another, whose kinds of file may differ."""
    def of(folder: Path, name: str) -> Path:
        return there.get((folder, name.lower()), folder / f"{name}.*")

    def files(folder: Path) -> Iterable[Path]:
        return [file for file in list_files(folder) if is_image(file)] if folder.is_dir() else []

    there = {(folder, file.stem.lower()): file for folder in (masks, fields) if folder for file in files(folder)}
    return [Photograph(each, of(masks, stem(each.stem)), fields and of(fields, field.format(each.stem)))
            for each in files(images)]  # fmt: skip
