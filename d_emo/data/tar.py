"""WebDataset's tar shards, read at random: a table of where each image lies takes the place of reading in sequence."""

import json
import re
import tarfile
from collections.abc import Container
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d_emo.data.listing import is_clutter
from d_emo.data.names import MOST_CLASSES, number_classes
from d_emo.data.reading import AS_VIEWED, Reading, describe_left_out, image_endings, no_images
from d_emo.data.stored import StoredImages
from d_emo.errors import InputError
from d_emo.files import cache_folder, digest, expand_home, replacing

_FIELDS = ("cls", "label", "class", "class_id", "class_index", "class_name", "category", "target")
"""Where members in JSON have the class."""
_RULES = 3
"""Of which images a shard has; with others, tables are built again."""

MOST_SHARDS = 1_000_000
"""Files that one ``{first..last}`` may stand for."""


class TarShards(StoredImages):
    """Local tar files in WebDataset's layout: members ``KEY.jpg`` (or png, webp, ...) and ``KEY.cls``, a class number
    or name; where there are none, ``KEY.json`` with it.

    The table of members is built once per set of files (their paths, sizes and times) and kept under
    ``$XDG_CACHE_HOME/d-emo``, nothing is written beside the shards. Image i is the i-th of the shards in their order.

    Args:
        pattern: Path of the shards; ``{000..015}`` stands for a range of numbers, ``*`` for anything.
        image_size: Side in pixels of the centre crop.
        class_names: File of class names, see `read_class_names`. Default: the numbers.
        first_class: The number that becomes class 0.
        label: Field of the class in ``KEY.json``.
        skip_corrupt, reading: See `StoredImages`.

    Raises:
        InputError: A shard is missing, is compressed or damaged, or holds no image with a class.
    """

    name = "wds"

    def __init__(
        self, pattern: str, image_size: int = 256, *, class_names: str | None = None, first_class: int = 0,
        label: str | None = None, skip_corrupt: bool = False, reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        self.shards = expand(pattern)
        table, words, left_out = _table(self.shards, label)
        self.left_out = describe_left_out(left_out)
        self.shard, self.offset, self.size, labels = (table[:, column] for column in range(4))
        self.sorted_names = len(words) > 0 and class_names is None
        labels, names = number_classes(
            words[labels].tolist() if len(words) else labels, pattern, class_names=class_names, first_class=first_class
        )
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
        if int(last) - int(first) not in range(MOST_SHARDS):
            raise InputError(f"{pattern[:200]} names no shards, or more than {MOST_SHARDS:,}; write first..last")
        parts = [pattern[: numbers.start()] + f"{number:0{len(first)}}" + pattern[numbers.end() :]
                 for number in range(int(first), int(last) + 1)]
        return [path for part in parts for path in expand(part)]
    path = expand_home(pattern)
    found = [path]
    if "*" in path.name:
        found = sorted(each for each in path.parent.glob(re.sub(r"\*+", "*", path.name)) if not is_clutter(each.name))
    missing = [str(each) for each in found if not each.is_file()] if found else [pattern]
    if missing:
        raise InputError(
            f"the shard {missing[0]} does not exist; name local files, as in 'wds:/data/train-{{000..015}}.tar'"
        )
    return found


def _table(shards: list[Path], field: str | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Shard, offset, size and class of every image, the words that the classes stand for, where they are words, and
    the files in place of an image that cannot be read.

    They come from the cache if they are there. Shape: (images, 4) int64, (words,).
    """
    state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in shards]
    cached = cache_folder() / f"wds-{digest(json.dumps([_RULES, sorted(image_endings()), field, state]))[:32]}.npz"
    try:
        with np.load(cached, allow_pickle=False) as file:
            return file["table"], file["words"], file["left_out"].tolist()
    except Exception:  # what reading a damaged file raises is anybody's guess; it is built again
        pass
    rows: list[tuple[int, int, int, int | str]] = []
    left_out: list[str] = []
    for number, path in enumerate(shards):
        found, others = _members(path, field)
        rows += [(number, *row) for row in found]
        left_out += others
    labels, words = [row[3] for row in rows], np.array([], dtype=str)
    if any(isinstance(label, str) for label in labels):
        words, labels = np.unique([str(label) for label in labels], return_inverse=True)
    table = np.array([(*row[:3], label) for row, label in zip(rows, labels, strict=True)], dtype=np.int64)
    with suppress(OSError), replacing(cached) as temporary, temporary.open("wb") as file:  # else built again next time
        np.savez(file, table=table, words=words, left_out=np.array(left_out, dtype=str))
    return table, words, left_out


def _members(path: Path, field: str | None) -> tuple[list[tuple[int, int, int | str]], list[str]]:
    """Offset, size and class of each image of one shard, in order, and what stands in place of other keys' images."""
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, int | str] = {}
    objects: list[tarfile.TarInfo] = []
    others: list[str] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                stem, _, suffix = member.name.rpartition(".")
                if member.isdir() or any(map(is_clutter, PurePosixPath(member.name).parts)):
                    continue
                kind = suffix.lower() if member.isfile() or member.islnk() else ""
                if kind == "cls":
                    classes[stem] = _label_of(archive.extractfile(member).read(), f"{member.name} in {path}")
                elif kind == "json":
                    objects.append(member)
                elif f".{kind}" in image_endings():
                    if stem in images:
                        raise _several(path, images[stem][0], member.name)
                    held = archive.getmember(member.linkname) if member.islnk() else member
                    images[stem] = member.name, held.offset_data, held.size
                else:
                    others.append(member.name)
            if field is not None or not classes:
                found = ((member.name, json.load(archive.extractfile(member))) for member in objects)
                classes = {name.rpartition(".")[0]: label for name, content in found
                           if (label := _label_in(content, field, f"{name} in {path}")) is not None}
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as an uncompressed tar of images and their classes ({error}); fetch or unpack it "
            "again"
        ) from None
    if not images:
        raise no_images(str(path), others)
    for name, offset, size in images.values():
        if offset + size > path.stat().st_size:
            raise InputError(f"{path} ends within {name}; fetch it again")
    rows = _match(path, images, classes)
    without = classes.keys() - rows.keys()
    return list(rows.values()), [name for name in others if _key(name, without) in without]


def _match(
    path: Path, images: dict[str, tuple[str, int, int]], classes: dict[str, int | str]
) -> dict[str, tuple[int, int, int | str]]:
    """Offset, size and class of each key's image.

    The class of an image is that of its own name (``a.b.png`` and ``a.b.cls``), else of its name up to an earlier dot
    (``a.image.png`` and ``a.cls``), where it may be one of several parts of a key: ``a.png`` and then ``a.image.png``
    go before others.
    """
    parts: dict[str, list[str]] = {}
    for stem, (name, _, _) in images.items():
        key = _key(stem, classes)
        label = classes.get(key, -1)
        if isinstance(label, int) and label < 0:
            raise InputError(
                f"{name} in {path} has no class: a member {stem}.cls with a number from 0, or {stem}.json with a field "
                f"{', '.join(_FIELDS)} (another one: label=FIELD after ?)"
            )
        if isinstance(label, int) and label >= MOST_CLASSES:  # may be too large for an array
            raise InputError(f"{name} in {path} has the label {label}; classes are numbered, to {MOST_CLASSES:,}")
        parts.setdefault(key, []).append(stem)
    rows = {}
    for key, stems in parts.items():
        best = sorted(stems, key=lambda stem: (stem != key, stem != f"{key}.image"))
        if len(stems) > 1 and best[0] not in (key, f"{key}.image"):
            raise _several(path, images[best[0]][0], images[best[1]][0])
        rows[key] = (*images[best[0]][1:], classes[key])
    return rows


def _key(name: str, known: Container[str]) -> str:
    """A member's name up to the last dot before which it is known."""
    while name not in known and "." in name.rpartition("/")[2]:
        name = name.rpartition(".")[0]
    return name


def _label_in(content: Any, field: str | None, name: str) -> int | str | None:
    """The class in a JSON member: under ``field``, or the first of the usual ones that it has; else None."""
    if not isinstance(content, dict):
        return None
    field = field or next((each for each in _FIELDS if each in content), None)
    label = content.get(field)
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise InputError(f"the field {field} of {name} is no class; name another with label=FIELD after ?")
    return _label(str(label)) if label is not None else None


def _label_of(content: bytes, name: str) -> int | str:
    """The class in a member of its own."""
    try:
        return _label(content.decode("utf-8-sig").strip())
    except UnicodeDecodeError:
        raise InputError(f"{name} is not UTF-8, as the name of a class must be; write it anew") from None


def _label(text: str) -> int | str:
    return int(text) if re.fullmatch("-?[0-9]+", text) else text


def _several(path: Path, first: str, second: str) -> InputError:
    return InputError(f"{path} holds two images of one key, {first} and {second}")
