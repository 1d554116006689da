"""Whether a run that goes on with data from another place has there what it was begun with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

from d_emo.config import RunSettings
from d_emo.config.paths import folder_of, followed, is_folder
from d_emo.data import spread
from d_emo.errors import InputError, OtherRunError
from d_emo.files import digest

LOOKED_AT, BYTES = 16, 2**16
"""How many files of a data set are looked at, and how much of each."""


def trace_of(dataset: Any) -> dict[str, Any]:
    """What tells data sets apart whose classes are called alike: "images", and a "digest" of some files, of how many.

    Args:
        dataset: One that is not of files, as built-in ones, has the digest of none; so has a stream, which would have
            to be read to its end.
    """
    has_files = hasattr(dataset, "source") and not getattr(dataset, "sequential", False)
    source = dataset.source if has_files else lambda index: None
    parts = (_beginning(source, index) for index in spread(len(dataset), LOOKED_AT))
    return {"images": len(dataset), "digest": digest(*parts)}


def check_same_data(
    settings: RunSettings, begun: Mapping[str, Any], state: Mapping[str, Any], trace: Mapping[str, Any],
    class_names: list[str],
) -> str:
    """Refuse to go on with other data. At one place images may come and go, as when a damaged one is repaired.

    Args:
        settings: Of now.
        begun: The settings that the run had.
        state: The training state to go on from.
        trace: Of the data of now.
        class_names: Of the data of now.

    Returns:
        A sentence on data that were moved; "" where they were not.

    Raises:
        OtherRunError: The data are at another place, and are others; both places are named.
    """
    names = settings.marked("resumable") & settings.marked("decisive") & settings.marked("source")
    moved = sorted(name for name in names if _place(begun.get(name)) != _place(getattr(settings, name)))
    if not begun or not moved:
        return ""
    before, now = ([values.get(name) or "built-in" for name in moved] for values in (begun, vars(settings)))
    places = "; ".join(f"{name} was {old}, now {new}" for name, old, new in zip(moved, before, now, strict=True))
    known, theirs = state.get("data") or {}, state.get("class_names") or class_names
    if reason := _difference(known, trace, theirs, class_names):
        raise OtherRunError(
            f"the run in {settings.output_dir} was begun with other data ({places}): {reason}; give the data that it "
            "had to resume, or choose another `output_dir`"
        )
    return f"the data are at another place ({places})"


def _difference(known: Mapping[str, Any], trace: Mapping[str, Any], theirs: list[str], ours: list[str]) -> str:
    if max(len(theirs), len(ours)) > 1 and sorted(theirs) != sorted(ours):  # a single class may be called as its folder
        odd = sorted(set(theirs) ^ set(ours))
        return f"the classes are others, such as {odd[0]}" if odd else "there are other numbers of classes of one name"
    if (images := known.get("images", trace["images"])) != trace["images"]:
        return f"there were {images:,} images, now there are {trace['images']:,}"
    return "the images are others" if known.get("digest", trace["digest"]) != trace["digest"] else ""


def _place(path: str | None) -> str | None:
    """A path as far as it can be followed; names of tar shards and of repositories as they are."""
    return path if path is None or not is_folder(path) else str(followed(folder_of(path)))


def _beginning(source: Callable[[int], Any], index: int) -> bytes:
    """The first bytes of a file and its size; nothing where there is none, or none that can be read."""
    try:
        if (file := source(index)) is None:
            return b""
        with file if isinstance(file, BytesIO) else open(file, "rb") as stream:
            return stream.read(BYTES) + b" %d" % stream.seek(0, os.SEEK_END)
    except (InputError, OSError):  # training tells of it
        return b""
