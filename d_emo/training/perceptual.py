"""A distance of images in the features of a classifier."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from d_emo.errors import InputError
from d_emo.io.snapshot import load_classifier
from d_emo.tables import parse_features

STAGES = 4
"""How many of a classifier's last stages are looked at."""


class PerceptualDistance(nn.Module):
    """The form of LPIPS (Zhang et al., 2018) without its learnt weights: squared distances of unit vectors of channels.

    Means over the positions of each of the last four stages, and over these. Its gradient goes to the second images.

    Args:
        features: emov2:SNAPSHOT, of a classifier of images.

    Raises:
        InputError: There is no such classifier, or it shows no four stages.
    """

    def __init__(self, features: str):
        super().__init__()
        extractor, source = parse_features(features)
        if extractor.name != "emov2":
            raise InputError(f"`perceptual_features` {features} passes no gradients; give emov2:SNAPSHOT")
        opened = load_classifier(source)
        self.network, self.side = opened.model.requires_grad_(False), opened.image_size
        if not hasattr(self.network, "forward_intermediates") or len(self.network.feature_info) < STAGES:
            kind = type(self.network).__name__
            raise InputError(f"`perceptual_features` {features} is a {kind}, which does not show {STAGES} stages")

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Unit vectors at each position of each stage. Shape: (B, 3, H, W) in [-1, 1] -> (B, C, h, w) each."""
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        given = self.network.forward_intermediates(
            images.contiguous(), indices=STAGES, norm=True, intermediates_only=True
        )
        return [F.normalize(each.float(), dim=1) for each in given]

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Mean distance. Shape: (B, 3, H, W), (B, 3, H, W) -> ()."""
        with torch.no_grad():
            wanted = self.maps(images)
        found = self.maps(others)
        return sum((a - b).square().sum(dim=1).mean() for a, b in zip(wanted, found, strict=True)) / STAGES
