"""What a data set of pictures with objects holds, before a detector is trained on it."""

from __future__ import annotations

from collections import Counter
from statistics import median

from d_emo.data.describing import describe_sizes, largest, look_over, some
from d_emo.detection.augment import ObjectImages, trainable


def describe_objects(images: ObjectImages, count: int) -> list[tuple[str, str]]:
    """Lines of (topic, text) about ``count`` pictures from all over and their objects; what looks wrong says LOOK."""
    names = images.class_names

    def read(index: int) -> tuple[tuple[int, int], list[int], list[float], int]:
        """Size, labels and shorter sides of what can be trained on, and how many objects there are in all."""
        picture, target = images.read(index)
        height, width = picture.shape[1:]
        kept = trainable(target, height, width)
        sides = (kept["boxes"][:, 2:] - kept["boxes"][:, :2]).amin(dim=1)
        return (width, height), kept["labels"].tolist(), sides.tolist(), len(target["labels"])

    seen, lines = look_over(images, count, read)
    if not seen:
        return lines
    numbers, sides = [len(labels) for _, labels, _, _ in seen], sorted(side for _, _, many, _ in seen for side in many)
    counts = Counter(label for _, labels, _, _ in seen for label in labels)
    lines.append(("sizes", describe_sizes([size for size, *_ in seen])))
    text = f"{min(numbers):,} to {max(numbers):,} an image, median {median(numbers):g}"
    if sides:
        text += f"; shorter side {sides[0]:.0f} to {sides[-1]:.0f} px, median {median(sides):.0f}"
    lines += [("objects", text), ("by class", largest(counts, names))]
    if left := sum(number for *_, number in seen) - sum(numbers):
        lines.append(("beside", f"{left:,} object{'s' * (left > 1)} not to be trained on: crowds, or without an area"))
    if empty := numbers.count(0):
        lines.append(("LOOK", f"{empty:,} image{'s' * (empty > 1)} without an object to train on"))
    if missing := [name for label, name in enumerate(names) if label not in counts]:
        lines.append(("LOOK", f"{len(missing):,} class{'es' * (len(missing) > 1)} without an object: {some(missing)}"))
    return lines
