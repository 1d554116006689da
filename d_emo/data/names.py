"""Names of classes: their order, what they may be, and how the labels of a data set get them."""

import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from d_emo.errors import InputError
from d_emo.files import expand_home

MOST_CLASSES = 1_000_000
"""Beyond which a label is no class, but an id or a number that was damaged."""


def in_class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their ids: as text, but where all are numbers by their values."""
    names = sorted(names)
    return sorted(names, key=int) if all(re.fullmatch("[0-9]+", name) for name in names) else names


def check_class_names(class_names: Sequence[str]) -> None:
    """Raise InputError for a name that a snapshot, its card or a path made of it could not hold."""
    for label, name in enumerate(class_names):
        if reason := _unwritable(name):
            raise InputError(
                f"class {label} is called {name!a}, which {reason}; rename it (for wds: and hf: data give other names "
                "with class_names=FILE after ?)"
            )


def number_classes(
    labels: Sequence[int] | Sequence[str] | np.ndarray, source: str, *, names: list[str] | None = None,
    class_names: str | None = None, first_class: int = 0,
) -> tuple[np.ndarray, list[str]]:
    """Class ids of the labels that a data set has, and a name for each; says which classes have no image.

    Shape: -> (images,) int64.

    Args:
        labels: Numbers, or names; at least one.
        source: The data set, for messages.
        names: Of the numbers, as the data set has them. Default: the labels as text.
        class_names: File of names that take their place, see `read_class_names`.
        first_class: The label that becomes class 0.

    Raises:
        InputError: Labels below ``first_class``, or that the file does not name.
    """
    if isinstance(labels[0], str):
        names = read_class_names(class_names) if class_names else in_class_order(set(labels))
        number_of = {name: number for number, name in enumerate(names)}
        if missing := sorted(set(labels) - number_of.keys()):
            raise InputError(f"{class_names} does not have the class {missing[0]!r} of {source}")
        ids = np.array([number_of[name] for name in labels])
    else:
        low, high = int(min(labels)), int(max(labels))
        if high >= MOST_CLASSES:
            raise InputError(f"{source} has the label {high}; classes are numbered from 0, or 1, to {MOST_CLASSES:,}")
        ids = np.asarray(labels, dtype=np.int64) - first_class
        if low < first_class:
            raise InputError(f"{source} has the label {low}, below first_class={first_class}")
        names = names or [str(number) for number in range(first_class, high + 1)]
        if class_names is not None:
            names = read_class_names(class_names, first_class)
            if len(names) <= high - first_class:
                from_one = low == 1 and len(names) == high
                hint = "; if these count from 1, add first_class=1 after ?" if from_one else ""
                raise InputError(
                    f"{class_names} has {len(names)} class names, the data have at least {high - first_class + 1} "
                    f"classes, labels {low} to {high}{hint}"
                )
    empty = np.flatnonzero(np.bincount(ids, minlength=len(names)) == 0)
    if len(empty):
        from_one = not first_class and ids.min() == 1
        hint = "; where labels count from 1, add first_class=1 after ?" if from_one else ""
        print(f"note: {len(empty)} of {len(names)} classes of {source} have no images, such as {empty[0]} "
              f"({names[empty[0]]}){hint}", file=sys.stderr, flush=True)
    return ids, names


def read_class_names(path: str, first_class: int = 0) -> list[str]:
    """Class names of a file, by id.

    A text file has one on each line, in UTF-8 (with or without its mark), UTF-16 with its mark, or else Latin-1. JSON
    has a list of names, names by id or ids by name; of several names of a class, as in Keras's
    ``imagenet_class_index.json``, the last one is taken.

    Raises:
        InputError: The file cannot be read, or does not name every class from the first to the last.
    """
    try:
        content = expand_home(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the class names in {path}: {error.strerror}") from None
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        print(f"note: {path} is not UTF-8, so it is read as Latin-1 (Windows-1252)", file=sys.stderr, flush=True)
    if not path.lower().endswith(".json"):
        return text.rstrip("\r\n").splitlines()
    try:
        return _names_in_json(json.loads(text), first_class)
    except Exception:  # it may be anything
        raise InputError(
            f"{path} is no JSON of class names: a list of them, or an object of names by id or of ids by name, which "
            "leaves no class out"
        ) from None


def _names_in_json(found: Any, first_class: int) -> list[str]:
    if isinstance(found, dict) and all(re.fullmatch("[0-9]+", key) for key in found):
        found = {int(key): name for key, name in found.items()}
    elif isinstance(found, dict):
        found = {number: name for name, number in found.items()}
    else:
        found = dict(enumerate(found, first_class))
    names = [found[number] for number in range(first_class, first_class + len(found))]
    return [name if isinstance(name, str) else str(name[-1]) for name in names]


def _unwritable(name: str) -> str | None:
    kinds = {unicodedata.category(character) for character in name}
    if "Cs" in kinds:
        return "is not UTF-8"
    if kinds & {"Cc", "Zl", "Zp"}:
        return "has control characters"
    if "/" in name or "\\" in name:
        return "has a path separator"
    return None if name.strip() else "is empty"
