"""COCO's average precision of a detector, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d_emo.detection.augment import ObjectImages, areas_of
from d_emo.detection.masks import rle

FIGURES = ("mAP", "AP50", "AP75", "small", "medium", "large")
"""The first six figures of COCO's summary; -1 where there is no object of a size."""


class AveragePrecision:
    """Gathers what is in pictures and what a detector found there, and gives COCO's figures.

    Annotations are numbered from 1 whatever their file calls them: both evaluators take an object with the id 0 for one
    that was not found. A detector that finds nothing has 0, where pycocotools fails.

    Args:
        class_names: By label from 0.
        masks: Whether masks are measured too.
    """

    def __init__(self, class_names: Sequence[str], *, masks: bool = False):
        self.masks, self.rle = masks, rle()
        self.images: list[dict[str, Any]] = []
        self.objects: list[dict[str, Any]] = []
        self.found: list[dict[str, Any]] = []
        self.categories = [{"id": label, "name": name} for label, name in enumerate(class_names, 1)]

    def add(self, size: tuple[int, int], target: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Take one picture.

        Args:
            size: Its (height, width).
            target: What is in it, as `ObjectImages` has it.
            found: Boxes, labels (from 0), scores and, where they are measured, masks (n, 1, H, W) in [0, 1].

        Shape: see `ObjectImages`.
        """
        number = len(self.images) + 1
        self.images.append({"id": number, "height": size[0], "width": size[1]})
        areas = areas_of(target)
        crowd = target.get("iscrowd", torch.zeros(len(areas), dtype=torch.bool))
        for i, row in enumerate(self._rows(number, target)):
            row |= {"id": len(self.objects) + 1, "area": float(areas[i]), "iscrowd": int(crowd[i])}
            self.objects.append(row | self._mask(target["masks"][i]) if self.masks else row)
        for i, row in enumerate(self._rows(number, found)):
            row |= {"score": float(found["scores"][i])}
            self.found.append(row | self._mask(found["masks"][i, 0] >= 0.5) if self.masks else row)

    def _rows(self, number: int, objects: dict[str, Tensor]) -> Iterable[dict[str, Any]]:
        boxes = objects["boxes"].detach().cpu().double()
        corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
        for box, label in zip(corners, objects["labels"].tolist(), strict=True):
            yield {"image_id": number, "category_id": label + 1, "bbox": box}

    def _mask(self, mask: Tensor) -> dict[str, Any]:
        return {"segmentation": self.rle.encode(np.asfortranarray(mask.detach().cpu().numpy().astype(np.uint8)))}

    def figures(self) -> dict[str, dict[str, float]]:
        """`FIGURES` by "bbox" and, where they are measured, "segm"."""
        return {kind: self._figures(kind) for kind in ("bbox", *["segm"] * self.masks)}

    def _figures(self, kind: str) -> dict[str, float]:
        from faster_coco_eval import COCO, COCOeval_faster

        found = [row for row in self.found]
        if not found and self.objects:  # something far away, so that there is a list to read
            found = [{**self.objects[0], "score": 0.0, "bbox": [-2.0, -2, 1, 1]}]
            found[0] |= self._mask(torch.zeros(self.images[0]["height"], self.images[0]["width"])) if self.masks else {}
        if not self.objects:
            return dict.fromkeys(FIGURES, -1.0)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO({"images": self.images, "annotations": self.objects, "categories": self.categories})
            evaluation = COCOeval_faster(truth, truth.loadRes(found), kind, print_function=lambda *_, **__: None)
            evaluation.run()
        return dict(zip(FIGURES, map(float, evaluation.stats[:6]), strict=True))


@torch.no_grad()
def measure_detector(
    model: nn.Module, images: ObjectImages, indices: Iterable[int] | None = None, *, masks: bool = False
) -> dict[str, dict[str, float]]:
    """COCO's figures of a detector on pictures of their own sizes; the model's mode is left as it was.

    Args:
        model: One of ours, see ``d_emo.detection.features.Detector``.
        images: Pictures and what is in them.
        indices: Which of them. Default: all.
        masks: Whether masks are measured too.
    """
    gathered, training, device = AveragePrecision(images.class_names, masks=masks), model.training, _device(model)
    model.eval()
    for index in range(len(images)) if indices is None else indices:
        image, target = images.read(index)
        (found,) = model([image.to(device).float() / 255])
        gathered.add(tuple(image.shape[1:]), target, {**found, "labels": found["labels"] - model.first_label})
    model.train(training)
    return gathered.figures()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
