"""What a data set holds, in sentences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, TypeVar

from d_emo.data import spread
from d_emo.errors import InputError
from d_emo.threads import thread_count

MOST_NAMED = 3
"""Of the images or classes that a line is about, how many it names."""
MOST_CLASSES = 8
"""Of the classes, the largest first, how many are listed with their images."""
Seen = TypeVar("Seen")


def look_at(length: int, count: int | None, read: Callable[[int], Seen]) -> tuple[list[Seen], list[str]]:
    """What ``read`` gives of ``count`` images from all over a data set, in order, and why others cannot be read."""

    def look(index: int) -> Seen | InputError:
        try:
            return read(index)
        except InputError as error:
            return error

    with ThreadPoolExecutor(thread_count()) as pool:
        seen = list(pool.map(look, spread(length, min(count or length, length))))
    failed = [str(each) for each in seen if isinstance(each, InputError)]
    return [each for each in seen if not isinstance(each, InputError)], failed


def look_over(
    data: Any, count: int | None, read: Callable[[int], Seen], *, unit: str = "images"
) -> tuple[list[Seen], list[tuple[str, str]]]:
    """As `look_at` a data set of ``unit``, and the first lines of (topic, text) about it."""
    seen, failed = look_at(len(data), count, read)
    number = f"{len(data):,} {unit} of {len(data.class_names):,} classes"
    lines = [("data", f"{data.name}: {number}; {len(seen):,} looked at")]
    if failed:
        lines.append(("LOOK", f"{len(failed):,} unreadable, training stops at them: {some(failed, '; ')}"))
    return seen, lines


def describe_sizes(sizes: Sequence[tuple[int, int]]) -> str:
    """Of (width, height) in pixels: the shorter sides, and how many sizes there are."""
    shorter = sorted(map(min, sizes))
    (often, _), *others = Counter(f"{width} x {height}" for width, height in sizes).most_common()
    if not others:
        return f"all are {often} px"
    return (f"shorter side {shorter[0]} to {shorter[-1]} px, median {median(shorter):g}; {len(others) + 1:,} sizes, "
            f"most often {often}")  # fmt: skip


def describe_passes(num_images: int, batch_size: int, max_steps: int) -> str:
    """Steps of an epoch, and how often a run passes over the data."""
    passes, epoch = max_steps * batch_size / num_images, math.ceil(num_images / batch_size)
    return (f"{epoch:,} step{'s' * (epoch > 1)} of {batch_size:,} images an epoch; {max_steps:,} steps pass over the "
            f"data {passes:,.{0 if passes > 100 else 1}f} times")  # fmt: skip


def largest(counts: Counter[int], class_names: Sequence[str], show: Callable[[int], str] = "{:,}".format) -> str:
    """The classes with most, by name."""
    named = [f"{class_names[label]} {show(count)}" for label, count in counts.most_common(MOST_CLASSES)]
    return ", ".join(named + ["..."] * (len(counts) > MOST_CLASSES))


def some(texts: Iterable[str], between: str = ", ") -> str:
    """The first of some texts, and dots where there are more."""
    texts = list(texts)
    return between.join(texts[:MOST_NAMED]) + (f"{between}..." if len(texts) > MOST_NAMED else "")
