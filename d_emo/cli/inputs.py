"""The pictures that a verb is given: files, folders and patterns."""

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d_emo.data import Reading, is_image, list_files
from d_emo.data.reading import no_images
from d_emo.errors import InputError


def find_images(sources: Sequence[str]) -> list[Path]:
    """Files as they are named, the images in folders, and those that patterns such as ``photos/*.jpg`` match.

    Sources keep their order; what is in a folder, or matches a pattern, is in the order of its path. No file comes
    twice.

    Raises:
        InputError: A folder without images, or a pattern that matches none.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.exists() or not glob.has_magic(source):
            files = list_files(path) if path.is_dir() else [path]
            images = [file for file in files if is_image(file)] if path.is_dir() else files
            where = f"the folder {path}"
        else:  # a shell that finds nothing hands the pattern on, and so do quotes
            places = sorted(map(Path, glob.glob(source, recursive=True)))
            files = [file for place in places for file in (list_files(place) if place.is_dir() else [place])]
            images, where = [file for file in files if is_image(file)], f"what matches {source}"
        if not images:
            raise no_images(where, files)
        found += images
    return list(dict.fromkeys(found))


def read_images(files: Sequence[Path], reading: Reading, *, skip_corrupt: bool) -> Iterator[tuple[int, Path, Tensor]]:
    """The pictures one by one, each with its number.

    Args:
        files: To read.
        reading: How a stored picture becomes RGB.
        skip_corrupt: Name what cannot be read on standard error and go on.

    Shape: pictures (3, H, W) uint8.

    Raises:
        InputError: One cannot be read, or with ``skip_corrupt`` none can.
    """
    skipped = 0
    for number, file in enumerate(files):
        try:
            picture = reading.read(file, lambda file=file: str(file))
        except InputError as error:
            if not skip_corrupt:
                raise InputError(f"{error}; `skip_corrupt` passes over such images") from None
            skipped += 1
            print(f"skipped ({skipped} so far): {error}", file=sys.stderr, flush=True)
            continue
        yield number, file, torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    if skipped == len(files):
        raise InputError("none of the images could be read")


def free_names(files: Sequence[Path]) -> list[str]:
    """A name for each file, its own without the ending, numbered where several have it."""
    seen: dict[str, int] = {}
    for file in files:
        seen[file.stem] = seen.get(file.stem, 0) + 1
    counts = dict.fromkeys(seen, 0)
    names = []
    for file in files:
        counts[file.stem] += 1
        names.append(file.stem if seen[file.stem] == 1 else f"{file.stem}-{counts[file.stem]}")
    return names
