"""How well the anchors of a detector fit the objects of some pictures; no training is needed to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from d_emo.detection.augment import ObjectImages, areas_of, trainable
from d_emo.detection.features import Detector

SIDES = (32, 96)
"""Between small and medium, and medium and large objects, as COCO has them: of squares of the same area, in pixels."""


class AnchorFit(NamedTuple):
    """Of the objects of one size.

    Attributes:
        count: How many there are.
        reached: The part of them that some anchor overlaps well enough; the others train their best anchor only,
            however little it overlaps.
        best: Mean over the objects of their best anchor's intersection over union.
    """

    count: int
    reached: float
    best: float


@torch.no_grad()
def fit_of_anchors(
    model: Detector, images: ObjectImages, indices: Iterable[int] | None = None, *, least: float = 0.5,
    sides: Sequence[float] = SIDES,
) -> list[AnchorFit]:  # fmt: skip
    """How well a detector's anchors fit the objects, from the smallest size to the largest.

    Pictures are resized as the detector does it in evaluation; the sizes of objects are those in the pictures
    themselves, as `AveragePrecision` has them.

    Args:
        model: One of ours; weights do not matter.
        images: Pictures and what is in them.
        indices: Which of them. Default: all.
        least: Intersection over union from which an anchor counts.
        sides: Where sizes part, see `SIDES`.
    """
    training, anchors = model.training, {}
    model.eval()
    best: list[Tensor] = []
    areas: list[Tensor] = []
    for index in range(len(images)) if indices is None else indices:
        image, target = images.read(index)
        kept = trainable({**target, "area": areas_of(target)}, *image.shape[1:])
        listed, (scaled,) = model.transform([image.float() / 255], [{"boxes": kept["boxes"], "labels": kept["labels"]}])
        if (shape := listed.tensors.shape) not in anchors:
            anchors[shape] = model.anchors(listed)
        if len(kept["boxes"]):
            best.append(box_iou(scaled["boxes"], anchors[shape]).amax(dim=1))
            areas.append(kept["area"])
    model.train(training)
    overlap, side = torch.cat([torch.zeros(0), *best]), torch.cat([torch.zeros(0), *areas]).sqrt()
    rows = []
    for low, high in pairwise((0, *sides, float("inf"))):
        chosen = overlap[(side >= low) & (side < high)]
        rows.append(AnchorFit(len(chosen), *(each.float().mean().item() for each in (chosen >= least, chosen))))
    return rows
