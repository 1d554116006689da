"""mIoU, mDice, aAcc and mAcc of a segmenter, over areas that are summed image by image."""

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
from d_emo.segmentation.sliding import Windows


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
        mean_iou: Intersection over union, mean over the classes that truth or prediction have (mIoU).
        mean_dice: Dice, mean over the same classes (mDice, the background's among them).
        pixel_accuracy: Right pixels (aAcc).
        mean_accuracy: Right pixels of a class, mean over the classes that the truth has (mAcc).
        iou: Of each class; None where neither truth nor prediction has it.
        dice: Of each class, 2 |A and B| / (|A| + |B|), the F1 of its pixels; None as there.
    """

    mean_iou: float
    mean_dice: float
    pixel_accuracy: float
    mean_accuracy: float
    iou: tuple[float | None, ...]
    dice: tuple[float | None, ...]

    @classmethod
    def of(cls, sums: Tensor) -> Quality:
        """From `Areas.sums`, of one process or added over several. Shape: (3, num_classes)."""
        agreed, truth, predicted = sums.double().cpu()
        union = truth + predicted - agreed
        iou, dice = agreed / union, 2 * agreed / (truth + predicted)  # NaN where there is none
        accuracy, there = agreed[truth > 0] / truth[truth > 0], union > 0
        by_class = [tuple(share if any_ else None for share, any_ in zip(each.tolist(), there.tolist(), strict=True))
                    for each in (iou, dice)]  # fmt: skip
        return cls(iou[there].mean().item(), dice[there].mean().item(), (agreed.sum() / truth.sum()).item(),
                   accuracy.mean().item(), *by_class)  # fmt: skip

    def __str__(self) -> str:
        return (f"mIoU {self.mean_iou:.2%}, mDice {self.mean_dice:.2%}, aAcc {self.pixel_accuracy:.2%}, mAcc "
                f"{self.mean_accuracy:.2%}")  # fmt: skip


@torch.no_grad()
def segment(
    model: nn.Module, image: Tensor, size: int | None = None, *, windows: Windows | None = None
) -> Tensor:
    """Logits of one image at its own size, computed with its shorter side resized; in eval mode.

    Args:
        model: Takes images in [-1, 1], gives {"out": logits}.
        image: What to segment.
        size: Pixels of the shorter side. Default: as it is.
        windows: Compute window by window. Default: the whole image at once.

    Shape: image (3, H, W) uint8 -> (num_classes, H, W).
    """
    device, training = next(model.parameters()).device, model.training
    given = to_input(TF.resize(image, shorter_side(image, size)) if size else image).to(device)
    model.eval()
    if windows is None:
        logits = model(given[None])["out"].float()[0]
    else:
        logits = windows.logits(lambda crops: model(crops)["out"].float(), given)
    model.train(training)
    return resized(logits[None], image.shape[1:])[0]


def measure(
    model: nn.Module, images: LabelledImages, size: int | None, indices: Sequence[int] | None = None, *,
    windows: Windows | None = None,
) -> tuple[Areas, float]:  # fmt: skip
    """Areas over some images (default: all), and the sum of their mean cross-entropies; see `segment`."""
    areas, loss = Areas(len(images.class_names)), 0.0
    for index in range(len(images)) if indices is None else indices:
        image, truth = images[index]
        logits = segment(model, image, size, windows=windows)
        truth = truth.to(logits.device)
        areas.add(logits.argmax(dim=0), truth)
        if (truth != IGNORED).any():
            loss += F.cross_entropy(logits[None], truth[None].long(), ignore_index=IGNORED).item()
    return areas, loss
