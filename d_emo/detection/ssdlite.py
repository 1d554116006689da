"""SSDLite of the EMOv1 and EMOv2 papers (table X): six levels, 6 anchors each, depthwise heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block

from d_emo.detection.features import Detector, StageMaps
from d_emo.errors import InputError

SIDES = (48, 100, 150, 202, 253, 304, 320)
"""Sides of the square anchors of the levels, and of the one behind them, in pixels."""
STRIDES = (16, 32, 64, 107, 160, 320)
PUBLISHED_SIZE = 320
EXTRA_WIDTHS = (512, 256, 256, 128)
Anchors = Literal["fixed", "scaled", "stretched"]
batch_norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)


class SSDLiteMaps(nn.Module):
    """Stages 3 and 4 as they are, then four levels of half the side each.

    Shape: (B, 3, H, W) -> by level (B, C, h, w).
    """

    def __init__(self, maps: StageMaps) -> None:
        super().__init__()
        self.maps, self.out_channels = maps, [*maps.widths, *EXTRA_WIDTHS]
        pairs = zip(self.out_channels[1:], EXTRA_WIDTHS, strict=False)
        self.extra = nn.ModuleList(_extra_block(before, width, batch_norm) for before, width in pairs)
        for layer in self.extra.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=0.03)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = list(self.maps(x).values())  # (B, C, H / 16, W / 16), (B, C, H / 32, W / 32)
        for block in self.extra:
            levels.append(block(levels[-1]))
        return OrderedDict((str(number), level) for number, level in enumerate(levels))


class SSDLite(Detector, SSD):
    """torchvision's SSD with mmdet's anchors and thresholds."""

    first_label = 1

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) that images are resized to."""
        return self.transform.fixed_size[::-1]


def sides_of(anchors: Anchors, image_size: int) -> list[float]:
    """Sides of the square anchors of the levels, and of the one behind them, in pixels."""
    smallest = {"fixed": 0.0, "scaled": 0.0, "stretched": SIDES[0]}[anchors]
    factor = 1.0 if anchors == "fixed" else (image_size - smallest) / (PUBLISHED_SIZE - smallest)
    return [smallest + (side - smallest) * factor for side in SIDES]


def ssdlite(
    backbone: str, *, num_classes: int = 80, image_size: int = PUBLISHED_SIZE,
    anchors: Anchors = "fixed", head_std: float | None = 0.001, norm_eval: bool = True,
    frozen_stages: int = 0, backbone_options: Mapping[str, Any] | None = None,
    image_mean: Sequence[float] | None = None, image_std: Sequence[float] | None = None,
) -> SSDLite:  # fmt: skip
    """SSDLite on a backbone.

    Args:
        backbone: Name of a classifier.
        num_classes: Classes of objects, without the background.
        image_size: Side of the square that images are resized to.
        anchors: "fixed" keeps anchors and strides of 320 px whatever the size, which the published networks of 512 px
            do: their grids of levels 4 to 6 cover a part of the image and no anchor is above 320 px. "scaled" lets
            anchors grow with the image and spreads every grid over all of it; "stretched" does so too, but the smallest
            anchors stay at 48 px.
        head_std: Standard deviation of the head's first weights; mmdet's is so small that behind its batch norms, of
            eps 0.001, next to nothing is left of a map for the first thousands of steps. None takes PyTorch's own.
        norm_eval: Keep the running statistics of the backbone's batch norms.
        frozen_stages: Stages of the backbone that are not trained, with the stem; 0 trains everything, as the papers.
        backbone_options: Arguments of `EMO` to replace.
        image_mean, image_std: Of the images, by which they are normalised. Default: ImageNet's; a classifier that was
            trained here has 0.5 for both.

    Raises:
        InputError: Unknown anchors.
    """
    if anchors not in get_args(Anchors):
        raise InputError(f"unknown anchors {anchors!r}; choose 'fixed' (as published), 'scaled' or 'stretched'")
    stages = StageMaps(backbone, (3, 4), frozen=frozen_stages, norm_eval=norm_eval, options=backbone_options)
    maps = SSDLiteMaps(stages)
    generator = DefaultBoxGenerator(
        [[2, 3]] * len(STRIDES), scales=[side / image_size for side in sides_of(anchors, image_size)],
        steps=list(STRIDES) if anchors == "fixed" else None, clip=False,
    )
    head = SSDLiteHead(maps.out_channels, generator.num_anchors_per_location(), num_classes + 1, batch_norm)
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d) and head_std is not None:
            nn.init.normal_(layer.weight, std=head_std)
        elif isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    model = SSDLite(
        maps, generator, (image_size, image_size), num_classes + 1, head=head, score_thresh=0.02, nms_thresh=0.45,
        detections_per_img=200, topk_candidates=1000, image_mean=image_mean, image_std=image_std,
    )
    model.num_classes = num_classes
    return model
