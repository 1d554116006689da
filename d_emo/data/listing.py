"""What a folder holds: the one walk of all who read images, and whether that are classes or splits."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from d_emo.errors import InputError

CLUTTER = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__pycache__",
    "thumbs.db", "desktop.ini",
}  # fmt: skip
"""Names, in lower case, that systems and programs leave among other people's files."""
_PART = r"(?:[-_ .]?(?:set|data|images|split|x?\d+|\bx))?"
_WORD = re.compile(
    r"(.*[-_ .])?(?:(train(?:ing)?)|val|valid|validation|test|testing|eval|evaluation|dev)((?-i:(?![a-z])).*)",
    re.IGNORECASE,
)
"""What is before such a word and after it: ``seg_train`` and ``seg_test`` are splits, ``bullet_train`` is none."""
_TRAIN = re.compile(rf"train(?:ing)?{_PART}", re.IGNORECASE)
_HELD_OUT = re.compile(rf"(?:val|valid|validation|test|testing|eval|evaluation|dev){_PART}", re.IGNORECASE)


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is no data: hidden (``._a.jpg``, ``.ipynb_checkpoints``), or `CLUTTER`."""
    return name.startswith(".") or name.lower() in CLUTTER


def list_files(root: Path) -> list[Path]:
    """All files below a folder but clutter, in the order of their paths.

    Links are followed. Each folder is read once, by its own path rather than by a link to it, and never one in which
    ``root`` itself lies, so that loops end.

    Raises:
        InputError: A folder that cannot be read.
    """
    found, folders, links = [], [root], []
    seen = _around(root)
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            key = _identity(folder)
            if key in seen:
                continue
            seen.add(key)
            with os.scandir(folder) as entries:
                kept = sorted((entry for entry in entries if not is_clutter(entry.name)), key=lambda entry: entry.name)
            for entry in kept:
                path = folder / entry.name
                if entry.is_symlink():
                    (links if path.is_dir() else found).append(path)
                else:
                    (folders if entry.is_dir() else found).append(path)
        except OSError as error:
            raise InputError(f"the folder {folder} cannot be read ({error.strerror})") from None
    return sorted(found)


def list_folders(root: Path) -> list[Path]:
    """The sub-folders of a folder that can be classes, in the order of their paths; links that lead up are none.

    Raises:
        InputError: The folder is missing or cannot be read.
    """
    if not root.is_dir():
        raise InputError(f"the data folder {root} does not exist; give a folder with one sub-folder per class")
    around = {*_around(root), _identity(root)}
    try:
        return sorted(entry for entry in root.iterdir()
                      if not is_clutter(entry.name) and entry.is_dir() and _identity(entry) not in around)
    except OSError as error:
        raise InputError(f"the folder {root} cannot be read ({error.strerror})") from None


def find_splits(folders: Iterable[Path]) -> tuple[list[Path], list[Path]] | None:
    """Which of these folders hold training and held-out images; None where they rather are classes.

    They are splits where there are some of both kinds, which may share what is before and after these words, or where
    nothing else is there.
    """
    folders = list(folders)
    around: dict[tuple[str, str], tuple[list[Path], list[Path]]] = {}
    for each in folders:
        if word := _WORD.fullmatch(each.name):
            around.setdefault((word[1], word[3]), ([], []))[word[2] is None].append(each)
    alike = [pair for pair in around.values() if all(pair)]
    train, held_out = (
        [each for each in folders if kind.fullmatch(each.name) or any(each in pair[at] for pair in alike)]
        for at, kind in enumerate((_TRAIN, _HELD_OUT))
    )
    held_out.sort(key=lambda each: not each.name.lower().startswith("val"))  # made for it, unlike test
    return (train, held_out) if train and held_out or len(train + held_out) == len(folders) > 0 else None


def _around(folder: Path) -> set[tuple[int, int]]:
    """The folders that a folder lies in, by the path given and by its own."""
    return {_identity(each) for path in (folder.absolute(), folder.resolve()) for each in path.parents}


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino
