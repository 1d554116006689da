"""Losses of segmenters beside the cross-entropy of pixels."""

import torch
from torch import Tensor

from d_emo.segmentation.images import IGNORED


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """One minus the Dice coefficient, 2 |P and T| / (|P| + |T|), mean over the classes that the truth has.

    Probabilities stand for the prediction; areas are summed over all images, and pixels without a class are left out.
    A class counts as much as any other, however few its pixels (V-Net, arXiv:1606.04797, per class).

    Shape: logits (B, num_classes, H, W), truth (B, H, W) -> ().
    """
    counted = (truth != IGNORED)[:, None]
    probability = logits.float().softmax(dim=1) * counted  # (B, K, H, W)
    classes = torch.arange(logits.shape[1], device=truth.device)[:, None, None]
    there = (truth[:, None] == classes).float()  # (B, K, H, W)
    both, sizes = (each.sum(dim=(0, 2, 3)) for each in (probability * there, probability + there))  # (K,)
    present = there.amax(dim=(0, 2, 3))
    return ((1 - 2 * both / sizes.clamp(min=1e-6)) * present).sum() / present.sum().clamp(min=1)
