"""Where stored images to be measured come from: folders, zips and ``.npz`` files."""

import io
import shlex
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from d_emo.data import centre_crop, is_clutter, list_files
from d_emo.data.describing import some
from d_emo.data.reading import AS_VIEWED, Reading, describe_left_out, is_image, naming, no_images
from d_emo.errors import InputError
from d_emo.evaluation.npz import NpzImages, choose_evenly, make_command
from d_emo.threads import thread_count

JPEG_SUFFIXES = {".jpg", ".jpeg", ".jfif"}
DECODING_THREADS = 8


class FolderImages:
    """The images in a folder and all its sub-folders, in the order of their paths.

    The headers of all files are read first, so that a wrong file is named before any network has run.

    Args:
        folder: The folder.
        num_images: How many of them. Default: all.
        reading: How they become RGB.
        any_size: Take images of several sizes too, which then wait for `crop_to`.
        skip_corrupt: Decode every file once before, and leave out those that cannot be read.

    Attributes:
        name: Path, for messages.
        image_size: (width, height) in pixels.
        mixed: Whether they are of several sizes.
        num_images: How many there are.
        num_jpegs: How many of them are stored as JPEG.
        left_out: A sentence on the files beside them that are no images, if there are some.
        skipped: A sentence on the images that cannot be read, and why, if some were passed over.

    Raises:
        InputError: No such folder, too few images in it, images of several sizes, or a file that is no image.
    """

    def __init__(
        self, folder: str | Path, *, num_images: int | None = None, reading: Reading = AS_VIEWED,
        any_size: bool = False, skip_corrupt: bool = False,
    ):  # fmt: skip
        self.name, self.reading, self.any_size, folder = str(folder), reading, any_size, Path(folder)
        self.skip_corrupt = skip_corrupt
        if not folder.is_dir():
            raise InputError(f"the folder {folder} does not exist")
        self._choose(list_files(folder), num_images, f"the folder {folder}")

    def _choose(self, files: list[Path], num_images: int | None, name: str) -> None:
        found = sorted(filter(is_image, files))
        if not found:
            raise no_images(name, files)
        others = (path for path in files if not is_image(path) and path.suffix != ".json")  # how they were drawn
        self.left_out = describe_left_out(others)
        found, self.skipped = self._readable(found, name) if self.skip_corrupt else (found, "")
        self.files = [found[index] for index in choose_evenly(len(found), num_images, name)]
        self.num_images = len(self.files)
        self.num_jpegs = sum(path.suffix.lower() in JPEG_SUFFIXES for path in self.files)
        self.image_size, self.mixed = self._read_size(self.files[0]), False
        for path in self.files[1:]:
            size = self._read_size(path)
            self.mixed = self.mixed or size != self.image_size
            if self.mixed and not self.any_size:
                raise InputError(
                    f"{self.files[0]} is {as_text(self.image_size)} px but {path} is {as_text(size)} px; bring all to "
                    f"one size, as in training: {cropping(self.name, min(*size, *self.image_size))} makes a file of "
                    "them that can be given instead"
                )

    def _readable(self, files: list[Path], name: str) -> tuple[list[Path], str]:
        """Those that can be decoded, and a sentence on the others."""

        def why_not(path: Path) -> str | None:
            try:
                self.reading.read(self._source(path), lambda: str(path))
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(min(DECODING_THREADS, thread_count())) as pool:
            reasons = list(pool.map(why_not, files))
        readable = [path for path, reason in zip(files, reasons, strict=True) if reason is None]
        unreadable = list(filter(None, reasons))
        if not readable:
            raise InputError(f"none of the {len(files):,} images in {name} could be read; the first: {unreadable[0]}")
        if not unreadable:
            return readable, ""
        count = len(unreadable)
        return readable, f"{count:,} image{'s' * (count > 1)} passed over: {some(unreadable, '; ')}"

    def crop_to(self, size: tuple[int, int]) -> None:
        """Crop images of several sizes as training does; those of one size stay as they are.

        Raises:
            InputError: The size, (width, height), is no square.
        """
        if self.mixed and size[0] != size[1]:
            raise InputError(f"the images of {self.name} are of several sizes and cannot be cropped to {as_text(size)} "
                             "px, which is no square; bring them to that size first")
        self.image_size = size if self.mixed else self.image_size

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
        with self._hinting():
            return self.reading.size(self._source(path), lambda: str(path))

    def _read_image(self, path: Path) -> torch.Tensor:
        """Decode one file. Shape: (3, H, W) uint8."""
        with self._hinting():
            image = self.reading.read(self._source(path), lambda: str(path))
        pixels = np.array(centre_crop(image, self.image_size[0]) if self.mixed else image)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    @contextmanager
    def _hinting(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(f"{error}; `skip_corrupt` passes over such images") from None


class ZipImages(FolderImages):
    """The images in a zip and all folders inside it, in the order of their names.

    Raises:
        InputError: Not an intact zip, or as for folders.
    """

    def __init__(
        self, path: str | Path, *, num_images: int | None = None, reading: Reading = AS_VIEWED,
        any_size: bool = False, skip_corrupt: bool = False,
    ):  # fmt: skip
        self.name, self.reading, self.any_size, self.skip_corrupt = str(path), reading, any_size, skip_corrupt
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
    source: str | Path, *, num_images: int | None = None, reading: Reading = AS_VIEWED, any_size: bool = False,
    skip_corrupt: bool = False,
) -> ImageSource:  # fmt: skip
    """Open a folder, a zip or an ``.npz`` file; of ``num_images``, so many, spread evenly over its order.

    With ``any_size``, images of several sizes are not refused, but wait for `FolderImages.crop_to`; with
    ``skip_corrupt`` those that cannot be read are left out.

    Raises:
        InputError: None of these, or see the classes of this module.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return NpzImages(path, num_images=num_images)
    if path.is_file() and path.suffix.lower() != ".zip":
        raise InputError(f"{path} is neither a folder of images nor a .zip or .npz file")
    kind = ZipImages if path.is_file() else FolderImages
    return kind(path, num_images=num_images, reading=reading, any_size=any_size, skip_corrupt=skip_corrupt)


def cropping(name: str, side: int) -> str:
    """The command that makes a reference of a folder's images, cropped as in training."""
    flags = ["--data-dir", name, "--image-size", str(max(side, 8)), "--output", f"{Path(name).resolve().name}.npz"]
    return f"`{make_command()} {shlex.join(flags)}`"


def as_text(size: tuple[int, int]) -> str:
    """Width and height as a sentence has them."""
    return f"{size[0]} x {size[1]}"

