"""Where stored images to be measured come from: folders, zips and ``.npz`` files."""

import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from d_emo.data import IMAGE_SUFFIXES, is_clutter, list_files
from d_emo.errors import InputError
from d_emo.evaluation.npz import NpzImages, choose_evenly
from d_emo.threads import thread_count

JPEG_SUFFIXES = {".jpg", ".jpeg"}
DECODING_THREADS = 8


class FolderImages:
    """The images in a folder and all its sub-folders, in the order of their paths.

    The headers of all files are read first, so that a wrong file is named before any network has run.

    Attributes:
        name: Path, for messages.
        image_size: (width, height) in pixels.
        num_images: How many there are.
        num_jpegs: How many of them are stored as JPEG.

    Raises:
        InputError: No such folder, too few images in it, images of several sizes or modes, or a file that is no 8-bit
            image.
    """

    def __init__(self, folder: str | Path, *, num_images: int | None = None):
        self.name, folder = str(folder), Path(folder)
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist")
        self._choose([path for path in list_files(folder) if _is_image(path)], num_images, f"the folder {folder}")

    def _choose(self, found: list[Path], num_images: int | None, name: str) -> None:
        if not found:
            raise InputError(f"{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        found = sorted(found)
        self.files = [found[index] for index in choose_evenly(len(found), num_images, name)]
        self.num_images = len(self.files)
        self.num_jpegs = sum(path.suffix.lower() in JPEG_SUFFIXES for path in self.files)
        self.image_size, first_mode = self._read_header(self.files[0])
        for path in self.files[1:]:
            size, mode = self._read_header(path)
            if mode != first_mode:
                raise InputError(
                    f"{self.files[0]} is stored as {first_mode} but {path} as {mode}; bring all images of a set to one "
                    "mode, RGB"
                )
            if size != self.image_size:
                raise InputError(
                    f"{self.files[0]} is {as_text(self.image_size)} px but {path} is {as_text(size)} px; "
                    "bring all images of a set to one size, as in training"
                )

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Yield the images, decoding one batch ahead of the network. Shape: (B, 3, H, W) uint8.

        Raises:
            InputError: A file cannot be decoded; the sentence names it.
        """
        with ThreadPoolExecutor(min(DECODING_THREADS, thread_count())) as pool:
            ahead = None
            for start in range(0, self.num_images, batch_size):
                decoding = pool.map(self._read_image, self.files[start : start + batch_size])
                if ahead is not None:
                    yield torch.stack(list(ahead))
                ahead = decoding
            yield torch.stack(list(ahead))

    def _open(self, path: Path) -> IO[bytes]:
        return path.open("rb")

    def _read_header(self, path: Path) -> tuple[tuple[int, int], str]:
        """Width and height, and the mode of the pixels."""
        try:
            with self._open(path) as stream, Image.open(stream) as image:
                mode, size = image.mode, image.size
        except Exception as error:  # Pillow's decoders raise many kinds for damaged files
            raise self._unreadable(path, error) from error
        if mode.startswith(("I", "F")):  # 16-bit and float pixels; Pillow would clip them at 255
            raise InputError(f"{path} has more than 8 bits per channel (mode {mode}); convert it to 8-bit RGB")
        return size, mode

    def _read_image(self, path: Path) -> torch.Tensor:
        """Decode one file; grey, palette, CMYK and alpha become RGB. Shape: (3, H, W) uint8."""
        try:
            with self._open(path) as stream, Image.open(stream) as image:
                pixels = np.array(image.convert("RGB"))
        except Exception as error:
            raise self._unreadable(path, error) from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _unreadable(self, path: Path, error: Exception) -> InputError:
        return InputError(f"cannot read the image {path} ({error}); repair or remove it")


class ZipImages(FolderImages):
    """The images in a zip and all folders inside it, in the order of their names.

    Raises:
        InputError: Not an intact zip, or as for folders.
    """

    def __init__(self, path: str | Path, *, num_images: int | None = None):
        self.name = str(path)
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:
            raise InputError(f"{path} is not an intact zip ({error})") from error
        self._names = {
            Path(path, name.lstrip("/")): name
            for name in self._archive.namelist()
            if _is_image(Path(name)) and name[-1] != "/" and not any(map(is_clutter, Path(name).parts))
        }
        self._choose(list(self._names), num_images, f"the zip {path}")

    def _open(self, path: Path) -> IO[bytes]:
        return io.BytesIO(self._archive.read(self._names[path]))  # whole, so that its checksum is checked


ImageSource = FolderImages | NpzImages


def open_images(source: str | Path, *, num_images: int | None = None) -> ImageSource:
    """Open a folder, a zip or an ``.npz`` file; of ``num_images``, so many, spread evenly over its order.

    Raises:
        InputError: None of these, or see the classes of this module.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return NpzImages(path, num_images=num_images)
    if path.is_file():
        if path.suffix.lower() != ".zip":
            raise InputError(f"{path} is neither a folder of images nor a .zip or .npz file")
        return ZipImages(path, num_images=num_images)
    return FolderImages(path, num_images=num_images)


def as_text(size: tuple[int, int]) -> str:
    """Width and height as a sentence has them."""
    return f"{size[0]} x {size[1]}"


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES
