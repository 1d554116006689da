"""WebDataset's tar shards, read at random: a table of where each image lies takes the place of reading in sequence."""

import json
import os
import re
import tarfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np

from d_emo.data.reading import AS_VIEWED, Reading, image_endings
from d_emo.data.stored import StoredImages
from d_emo.errors import InputError
from d_emo.files import digest, replacing


class TarShards(StoredImages):
    """Local tar files in WebDataset's layout: members ``KEY.jpg`` (or png, webp, ...) and ``KEY.cls``, a class number.

    The table of members is built once per set of files (their paths, sizes and times) and kept under
    ``$XDG_CACHE_HOME/d-emo``, nothing is written beside the shards. Image i is the i-th of the shards in their order.

    Args:
        pattern: Path of the shards; ``{000..015}`` stands for a range of numbers, ``*`` for anything.
        image_size: Side in pixels of the centre crop.
        class_names: File with one class name per line. Default: the numbers.
        skip_corrupt, reading: See `StoredImages`.

    Raises:
        InputError: A shard is missing, is compressed or damaged, or holds no image with a class.
    """

    name = "wds"

    def __init__(
        self, pattern: str, image_size: int = 256, *, class_names: str | None = None, skip_corrupt: bool = False,
        reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        self.shards = expand(pattern)
        table = _table(self.shards)
        self.shard, self.offset, self.size, labels = (table[:, column] for column in range(4))
        names = [str(number) for number in range(int(labels.max()) + 1)]
        if class_names is not None:
            names = _read_names(class_names, at_least=len(names))
        super().__init__(labels, names, image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> BytesIO:
        with self.shards[self.shard[index]].open("rb") as file:  # opened each time: no limit of open files, fork-safe
            file.seek(self.offset[index])
            return BytesIO(file.read(self.size[index]))

    def origin(self, index: int) -> str:
        shard, offset = self.shards[self.shard[index]], self.offset[index]
        with tarfile.open(shard) as archive:
            return f"{next(member.name for member in archive if member.offset_data == offset)} in {shard}"


def expand(pattern: str) -> list[Path]:
    """The files that ``{000..015}`` and ``*`` stand for, in order; InputError where there is none."""
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if numbers:
        first, last = numbers.groups()
        parts = [pattern[: numbers.start()] + f"{number:0{len(first)}}" + pattern[numbers.end() :]
                 for number in range(int(first), int(last) + 1)]
        return [path for part in parts for path in expand(part)]
    path = Path(pattern).expanduser()
    found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    missing = [str(each) for each in found if not each.is_file()] if found else [pattern]
    if missing:
        raise InputError(
            f"the shard {missing[0]} does not exist; name local files, as in 'wds:/data/train-{{000..015}}.tar'"
        )
    return found


def _table(shards: list[Path]) -> np.ndarray:
    """Shard, offset, size and class of every image, from the cache if it is there. Shape: (images, 4) int64."""
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    key = digest(json.dumps(state))[:32]
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d-emo" / f"wds-{key}.npy"
    try:
        return np.load(cached, allow_pickle=False)
    except (OSError, ValueError):
        pass
    table = np.array([(number, *row) for number, path in enumerate(shards) for row in _members(path)], dtype=np.int64)
    with suppress(OSError), replacing(cached) as temporary:  # where it cannot be written, it is built again next time
        np.save(temporary, table)
    return table


def _members(path: Path) -> list[tuple[int, int, int]]:
    """Offset, size and class of each image of one shard, in order."""
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                base, _, suffix = base.partition(".")
                key = f"{folder}/{base}"
                if member.isfile() and suffix == "cls":
                    classes[key] = int(archive.extractfile(member).read())
                elif member.isfile() and f".{suffix.lower()}" in image_endings():
                    if key in images:
                        raise InputError(f"{path} holds two images of one key, {images[key][0]} and {member.name}")
                    images[key] = member.name, member.offset_data, member.size
    except (OSError, tarfile.TarError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read as an uncompressed tar of images and class numbers ({error}); fetch or unpack it "
            "again"
        ) from None
    for key, (name, offset, size) in images.items():
        if classes.get(key, -1) < 0:
            raise InputError(f"{name} in {path} has no class: a member {key.lstrip('/')}.cls with a number from 0")
        if offset + size > path.stat().st_size:
            raise InputError(f"{path} ends within {name}; fetch it again")
    if not images:
        raise InputError(f"{path} holds no images ({', '.join(sorted(image_endings()))})")
    return [(offset, size, classes[key]) for key, (_, offset, size) in images.items()]


def _read_names(path: str, *, at_least: int) -> list[str]:
    try:
        names = Path(path).expanduser().read_text().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the class names in {path}: {error.strerror}") from None
    if len(names) < at_least:
        raise InputError(f"{path} has {len(names)} class names, the data have at least {at_least} classes")
    return names
