"""What a data set of images with masks holds, before a segmenter is trained on it."""

from __future__ import annotations

from collections import Counter

import torch

from d_emo.data.describing import describe_sizes, largest, look_over, some
from d_emo.segmentation.images import IGNORED, LabelledImages


def describe_masks(images: LabelledImages, count: int) -> list[tuple[str, str]]:
    """Lines of (topic, text) about ``count`` images from all over and their masks; what looks wrong says LOOK."""
    names = images.class_names

    def read(index: int) -> tuple[tuple[int, int], torch.Tensor]:
        """Size, and the pixels of each value of the mask. Shape: (256,)."""
        _, mask = images[index]
        return (mask.shape[1], mask.shape[0]), torch.bincount(mask.flatten().long(), minlength=IGNORED + 1)

    seen, lines = look_over(images, count, read)
    if not seen:
        return lines
    pixels = torch.stack([counts for _, counts in seen])  # (N, 256)
    total, ignored = pixels.sum(dim=0), pixels[:, IGNORED].sum() / pixels.sum()
    counts = Counter({label: int(total[label]) for label in range(len(names)) if total[label]})
    share = largest(counts, names, lambda count: f"{count / max(1, counts.total()):.1%}")
    there = Counter({label: int((pixels[:, label] > 0).sum()) for label in counts})
    lines += [("sizes", describe_sizes([size for size, _ in seen])), ("by pixels", share or "none"),
              ("by images", largest(there, names) or "none")]  # fmt: skip
    if ignored:
        lines.append(("ignored", f"{ignored:.1%} of the pixels are of no class"))
    if empty := int((pixels[:, :IGNORED].sum(dim=1) == 0).sum()):
        lines.append(("LOOK", f"{empty:,} mask{'s' * (empty > 1)} without a pixel of any class"))
    if missing := [name for label, name in enumerate(names) if label not in counts]:
        lines.append(("LOOK", f"{len(missing):,} class{'es' * (len(missing) > 1)} in no mask: {some(missing)}"))
    return lines
