"""Where stored images to be measured come from: folders, zips and ``.npz`` files."""

import io
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from d_emo.data import is_clutter, list_files
from d_emo.data.reading import AS_VIEWED, Reading, describe_left_out, is_image, naming, no_images
from d_emo.errors import InputError
from d_emo.evaluation.npz import NpzImages, choose_evenly
from d_emo.threads import thread_count

JPEG_SUFFIXES = {".jpg", ".jpeg", ".jfif"}
DECODING_THREADS = 8


class FolderImages:
    """The images in a folder and all its sub-folders, in the order of their paths.

    The headers of all files are read first, so that a wrong file is named before any network has run.

    Attributes:
        name: Path, for messages.
        image_size: (width, height) in pixels.
        num_images: How many there are.
        num_jpegs: How many of them are stored as JPEG.
        left_out: A sentence on the files beside them that are no images, if there are some.

    Raises:
        InputError: No such folder, too few images in it, images of several sizes, or a file that is no image.
    """

    def __init__(self, folder: str | Path, *, num_images: int | None = None, reading: Reading = AS_VIEWED):
        self.name, self.reading, folder = str(folder), reading, Path(folder)
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist")
        self._choose(list_files(folder), num_images, f"the folder {folder}")

    def _choose(self, files: list[Path], num_images: int | None, name: str) -> None:
        found = sorted(filter(is_image, files))
        if not found:
            raise no_images(name, files)
        others = (path for path in files if not is_image(path) and path.suffix != ".json")  # how they were drawn
        self.left_out = describe_left_out(others)
        self.files = [found[index] for index in choose_evenly(len(found), num_images, name)]
        self.num_images = len(self.files)
        self.num_jpegs = sum(path.suffix.lower() in JPEG_SUFFIXES for path in self.files)
        self.image_size = self._read_size(self.files[0])
        for path in self.files[1:]:
            size = self._read_size(path)
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

    def _source(self, path: Path) -> Path | io.BytesIO:
        return path

    def _read_size(self, path: Path) -> tuple[int, int]:
        return self.reading.size(self._source(path), lambda: str(path))

    def _read_image(self, path: Path) -> torch.Tensor:
        """Decode one file. Shape: (3, H, W) uint8."""
        pixels = np.array(self.reading.read(self._source(path), lambda: str(path)))
        return torch.from_numpy(pixels).permute(2, 0, 1)


class ZipImages(FolderImages):
    """The images in a zip and all folders inside it, in the order of their names.

    Raises:
        InputError: Not an intact zip, or as for folders.
    """

    def __init__(self, path: str | Path, *, num_images: int | None = None, reading: Reading = AS_VIEWED):
        self.name, self.reading = str(path), reading
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:
            raise InputError(f"{path} is not an intact zip ({error})") from error
        self._names = {
            Path(path, name.lstrip("/")): name
            for name in self._archive.namelist()
            if name[-1] != "/" and not any(map(is_clutter, Path(name).parts))
        }
        self._choose(list(self._names), num_images, f"the zip {path}")

    def _source(self, path: Path) -> io.BytesIO:
        with naming(lambda: str(path)):
            return io.BytesIO(self._archive.read(self._names[path]))  # whole, so that its checksum is checked


ImageSource = FolderImages | NpzImages


def open_images(
    source: str | Path, *, num_images: int | None = None, reading: Reading = AS_VIEWED
) -> ImageSource:
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
        return ZipImages(path, num_images=num_images, reading=reading)
    return FolderImages(path, num_images=num_images, reading=reading)


def as_text(size: tuple[int, int]) -> str:
    """Width and height as a sentence has them."""
    return f"{size[0]} x {size[1]}"

