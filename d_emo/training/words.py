"""Start values for a model's rows of classes: sums of vectors of the words in the classes' names."""

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import torch


@torch.no_grad()
def start_from_words(table: torch.Tensor, class_names: Sequence[str], *, std: float, seed: int) -> None:
    """Write sums of random vectors, one for each word of a class's name, into its row: what shares words starts alike.

    The sums are divided by the square root of their number of words. Names without words, and rows behind those of
    the classes, stay as they are; of classes of the same name, all but the first have a vector of their own beside
    the words'. A word's vector depends on itself and the seed alone.

    Args:
        table: Changed in place.
        class_names: One for each row, from the first.
        std: Standard deviation of the rows' values.
        seed: Of the vectors.

    Shape: table (classes or more, C).
    """
    alike: Counter[tuple[str, ...]] = Counter()
    for row, name in zip(table, class_names, strict=False):
        words = tuple(re.findall(r"\w+", name.lower()))
        apart = (f"no. {alike[words]}",) if alike[words] else ()  # a crane is a bird, and another class a machine
        alike[words] += 1
        seeds = [zlib.crc32(f"{seed} {word}".encode()) for word in words + apart]
        if words:
            parts = [torch.randn(len(row), generator=torch.Generator().manual_seed(each)) for each in seeds]
            row.copy_(sum(parts) * std / len(parts) ** 0.5)
