"""``.npz`` files in ADM's layout: images as ``arr_0``, statistics as ``mu`` and ``sigma``. Nothing is unpickled."""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import torch

from d_emo.data import spread
from d_emo.errors import InputError, RunError
from d_emo.evaluation.statistics import StoredStatistics
from d_emo.files import replacing
from d_emo.text import command

IMAGES_KEY = "arr_0"
COUNT_KEY, FEATURES_KEY = "num_images", "features"  # ours beside ADM's: what the statistics are over and of
POOLED_KEYS, SPATIAL_KEYS = ("mu", "sigma"), ("mu_s", "sigma_s")


def make_command() -> str:
    """What writes such a file, as whoever runs this process would run it."""
    return command("reference", "make_reference.py")


def choose_evenly(available: int, wanted: int | None, name: str) -> Sequence[int]:
    """Which images of a stored set to measure: all, or ``wanted`` of them from all over the order.

    The first images of an ordered set are those of its first classes, and equal steps can miss classes too.

    Raises:
        InputError: Fewer than two images, there or wanted, or more wanted than there.
    """
    if available < 2:
        raise InputError(f"{name} holds {available} image; a covariance needs at least two")
    if wanted is None:
        return range(available)
    if wanted < 2:
        raise InputError(f"{wanted} images were asked for (`num_images`); a covariance needs at least two")
    if wanted > available:
        raise InputError(f"{wanted} images were asked for (`num_images`), but {name} holds {available}")
    return spread(available, wanted)


class NpzImages:
    """The images ``arr_0`` of an ``.npz`` file, read batch by batch; with the attributes of ``FolderImages``.

    Raises:
        InputError: No such file, not an archive, no ``arr_0``, another type or shape, or too few images.
    """

    num_jpegs, left_out, skipped, mixed = 0, "", "", False  # what the images were before is not recorded

    def __init__(self, path: str | Path, *, num_images: int | None = None):
        self.path, self.name = Path(path), str(path)
        keys = archive_keys(self.path)
        if IMAGES_KEY not in keys:
            raise InputError(
                f"{path} holds the keys {', '.join(sorted(keys)) or '(none)'}; "
                f"images are expected as {IMAGES_KEY}, uint8 of shape (N, H, W, 3); "
                "a reference may hold mu and sigma instead"
            )
        with _open_array(self.path, IMAGES_KEY) as stream:
            shape, fortran_order, dtype = _read_header(stream)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape[1:3] or fortran_order:
            raise InputError(
                f"{IMAGES_KEY} of {path} is {dtype} of shape {shape}{' in Fortran order' if fortran_order else ''}; "
                "images are expected as uint8 of shape (N, H, W, 3)"
            )
        self.image_size = (shape[2], shape[1])
        self._indices = choose_evenly(shape[0], num_images, self.name)
        self.num_images = len(self._indices)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Yield the images in order. Shape: (B, 3, H, W) uint8.

        Raises:
            InputError: The file ends early or its checksum is wrong.
        """
        width, height = self.image_size
        image_bytes, position = 3 * width * height, 0
        with _open_array(self.path, IMAGES_KEY) as stream:
            _read_header(stream)
            for start in range(0, self.num_images, batch_size):
                chunk, pixels = self._indices[start : start + batch_size], bytearray()
                for index in chunk:
                    stream.seek((index - position) * image_bytes, io.SEEK_CUR)
                    pixels += stream.read(image_bytes)
                    position = index + 1
                if len(pixels) != len(chunk) * image_bytes:
                    raise EOFError("the file ends early")
                images = torch.frombuffer(pixels, dtype=torch.uint8).view(len(chunk), height, width, 3)
                yield images.permute(0, 3, 1, 2).contiguous()


def archive_keys(path: Path) -> set[str]:
    """Names of the arrays in an ``.npz`` file.

    Raises:
        InputError: No such file, or not an archive.
    """
    if not path.is_file():
        raise InputError(f"the file {path} does not exist")
    with _damage_named(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_statistics(path: str | Path, dim: int, keys: tuple[str, str] = POOLED_KEYS) -> StoredStatistics:
    """Read a mean and a covariance, called ``keys``, of an ``.npz`` file in ADM's layout.

    Raises:
        InputError: Not an archive, or statistics that are not finite numbers over ``dim`` features.
    """
    path = Path(path)
    mu, sigma = (read_array(path, key) for key in keys)
    if mu.shape != (dim,) or sigma.shape != (dim, dim):
        raise InputError(
            f"{path} holds {keys[0]} of shape {mu.shape} and {keys[1]} of shape {sigma.shape}, but the features in use "
            f"have {dim} dimensions; take statistics of the same features"
        )
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{keys[0]} and {keys[1]} of {path} must be finite floating-point numbers")
    moments = (torch.from_numpy(each.astype(np.float64)) for each in (mu, sigma))
    count = read_array(path, COUNT_KEY) if COUNT_KEY in archive_keys(path) else None
    if count is not None and (count.shape or count.dtype.kind not in "iu"):
        raise InputError(f"{COUNT_KEY} of {path} must be one whole number; write it again with `{make_command()}`")
    return StoredStatistics(*moments, None if count is None else int(count))


def read_text(path: Path, key: str) -> str | None:
    """A string of an ``.npz`` file, or None if it has no such entry."""
    return str(read_array(path, key)) if key in archive_keys(path) else None


def is_intact(path: Path) -> bool:
    """Whether every array of an ``.npz`` file matches its checksum; reads all of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile and zlib raise a dozen types for a damaged file
        return False


def read_array(path: Path, key: str) -> np.ndarray:
    """One array of an ``.npz`` file; objects are refused."""
    with _open_array(path, key) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def write_npz(
    path: Path, images: Iterable[torch.Tensor], num_images: int, image_size: tuple[int, int],
    arrays: Callable[[], dict[str, np.ndarray | str | int]],
) -> None:
    """Write an ``.npz`` file, all or nothing: images as ``arr_0``, streamed, and what ``arrays`` gives after them.

    Without any images there is no ``arr_0``. Shape: images (B, 3, H, W) uint8 each.

    Raises:
        RunError: The disk is full, say.
    """
    left, shape = num_images, (num_images, image_size[1], image_size[0], 3)
    try:
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) if left else nullcontext() as stream:
                if left:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                for batch in images:
                    left -= len(batch)
                    assert batch.shape[2:] == shape[1:3]
                    stream.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            assert left == 0
            for key, value in arrays().items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.asarray(value), allow_pickle=False)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn every error of reading an archive into a sentence that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise a dozen types for a damaged file
        raise InputError(f"{path} is not an intact .npz file ({error}); write it again with numpy.savez") from error


@contextmanager
def _open_array(path: Path, key: str) -> Iterator[IO[bytes]]:
    with _damage_named(path), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as stream:
        yield stream


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)
