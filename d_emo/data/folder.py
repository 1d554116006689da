"""Image folders in ImageNet's layout, with the centre crop of ADM and DiT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from d_emo.config import InputError
from d_emo.data.images import ClassImages, check_image_size, to_tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Square centre crop as ADM and DiT prepare ImageNet: halve by box filter while twice too large, then bicubic.

    Raises:
        InputError: The image's shorter side is below ``image_size``.
    """
    if min(image.size) < image_size:
        raise InputError(f"the image is {image.width} x {image.height} px, smaller than the {image_size} px asked for")
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def load_image(
    path: Path, image_size: int, crop: Callable[[Image.Image, int], Image.Image] = centre_crop
) -> torch.Tensor:
    """Read and crop one image file.

    Args:
        path: The file.
        image_size: Side in pixels.
        crop: Makes a square image out of (RGB image, side).

    Returns:
        float32 in [-1, 1]. Shape: (3, image_size, image_size).

    Raises:
        InputError: The file cannot be read as an image or is too small; the sentence names it.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read the image {path} ({error}); repair it or use --skip-corrupt") from None
    try:
        return to_tensor(crop(image, image_size))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class ImageFolder(ClassImages):
    """Images in one sub-folder per class, as ImageNet is laid out; classes in the order of their folder names.

    Args:
        root: Folder of class folders.
        image_size: Side in pixels of the centre crop.
        skip_corrupt: Take the next image in place of an unreadable or too small one, name and count it.
    Raises:
        InputError: The folder is missing, has no class folders, or a class folder holds no image.
    """

    name = "folder"
    flip = True

    def __init__(self, root: str | Path, image_size: int = 256, *, skip_corrupt: bool = False):
        check_image_size(image_size)
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"the data folder {root} does not exist; give a folder with one sub-folder per class")
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not folders:
            raise InputError(f"the data folder {root} has no sub-folders; put each class's images into one of its own")
        self.image_size, self.skip_corrupt = image_size, skip_corrupt
        self.class_names = [folder.name for folder in folders]
        self.files: list[Path] = []
        self.labels: list[int] = []
        for label, folder in enumerate(folders):
            found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise InputError(f"the class folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            self.files += found
            self.labels += [label] * len(found)
        self.skipped = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # one count over all workers

    def __len__(self) -> int:
        return len(self.files)

    def label(self, index: int) -> int:
        return self.labels[index]

    def crop(self, image: Image.Image, index: int) -> Image.Image:
        """The square part of image ``index`` that is used."""
        return centre_crop(image, self.image_size)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        for offset in range(len(self.files)):
            at = (index + offset) % len(self.files)
            try:
                image = load_image(self.files[at], self.image_size, lambda image, size: self.crop(image, index))
                return image, self.labels[at]
            except InputError:
                if not self.skip_corrupt:
                    raise
                if not self.skipped[at]:
                    self.skipped[at] = True
                    print(f"skipped {self.files[at]} ({int(self.skipped.sum())} so far)", file=sys.stderr, flush=True)
        raise InputError("none of the images could be read")
