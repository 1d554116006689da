"""mIoU, aAcc and mAcc of a segmenter, over areas that are summed image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from d_emo.segmentation.augment import shorter_side, to_input
from d_emo.segmentation.heads import resized
from d_emo.segmentation.images import IGNORED, LabelledImages


class Areas:
    """Pixels of each class in truth and prediction, and where both agree.

    Args:
        num_classes: Number of classes.

    Attributes:
        sums: Pixels where both agree, of the truth, of the prediction. Shape: (3, num_classes) float64.
    """

    def __init__(self, num_classes: int):
        self.sums = torch.zeros(3, num_classes, dtype=torch.float64)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Count the pixels of some images that are not ignored. Shape: (..., H, W) twice, classes."""
        counted = truth != IGNORED
        predicted, truth, classes = predicted[counted].long(), truth[counted].long(), self.sums.shape[1]
        parts = (truth[predicted == truth], truth, predicted)
        self.sums += torch.stack([torch.bincount(part, minlength=classes) for part in parts]).cpu()


@dataclass(frozen=True)
class Quality:
    """How good a segmenter is, as fractions.

    Attributes:
        mean_iou: Intersection over union, mean over the classes that truth or prediction have.
        pixel_accuracy: Right pixels (aAcc).
        mean_accuracy: Right pixels of a class, mean over the classes that the truth has (mAcc).
        iou: Of each class; None where neither has it.
    """

    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: tuple[float | None, ...]

    @classmethod
    def of(cls, sums: Tensor) -> Quality:
        """From `Areas.sums`, of one process or added over several. Shape: (3, num_classes)."""
        agreed, truth, predicted = sums.double().cpu()
        union = truth + predicted - agreed
        iou = agreed / union  # NaN where there is none
        there = [None if area == 0 else share for area, share in zip(union.tolist(), iou.tolist(), strict=True)]
        accuracy = agreed[truth > 0] / truth[truth > 0]
        return cls(iou[union > 0].mean().item(), (agreed.sum() / truth.sum()).item(), accuracy.mean().item(),
                   tuple(there))  # fmt: skip

    def __str__(self) -> str:
        return f"mIoU {self.mean_iou:.2%}, aAcc {self.pixel_accuracy:.2%}, mAcc {self.mean_accuracy:.2%}"


@torch.no_grad()
def segment(model: nn.Module, image: Tensor, size: int | None = None) -> Tensor:
    """Logits of one image at its own size, computed with its shorter side resized; in eval mode.

    Args:
        model: Takes images in [-1, 1], gives {"out": logits}.
        image: What to segment.
        size: Pixels of the shorter side. Default: as it is.

    Shape: image (3, H, W) uint8 -> (num_classes, H, W).
    """
    device, training = next(model.parameters()).device, model.training
    given = to_input(TF.resize(image, shorter_side(image, size)) if size else image)[None].to(device)
    logits = model.eval()(given)["out"].float()
    model.train(training)
    return resized(logits, image.shape[1:])[0]


def measure(
    model: nn.Module, images: LabelledImages, size: int | None, indices: Sequence[int] | None = None
) -> tuple[Areas, float]:
    """Areas over some images (default: all), and the sum of their mean cross-entropies."""
    areas, loss = Areas(len(images.class_names)), 0.0
    for index in range(len(images)) if indices is None else indices:
        image, truth = images[index]
        logits = segment(model, image, size)
        truth = truth.to(logits.device)
        areas.add(logits.argmax(dim=0), truth)
        if (truth != IGNORED).any():
            loss += F.cross_entropy(logits[None], truth[None].long(), ignore_index=IGNORED).item()
    return areas, loss
