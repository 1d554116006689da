"""Mask R-CNN of the EMOv2 paper (table XII), with mmdet's anchors, regions of interest and counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from d_emo.detection.features import Detector, Pyramid, StageMaps
from d_emo.detection.retinanet import COUNTED_SIZE, ExactAnchors


class AlignedRoIAlign(MultiScaleRoIAlign):
    """Regions of interest as mmdet reads them: shifted by half a pixel, as many samples as a region has pixels.

    Shape: by level (B, C, h, w), boxes (n, 4) each -> (sum of n, C, side, side).
    """

    strides = (4, 8, 16, 32)

    def __init__(self, output_size: int) -> None:
        super().__init__(["1", "2", "3", "4"], output_size, sampling_ratio=0)
        self.level_of = LevelMapper(2, 5)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        maps = [x[name] for name in self.featmap_names]
        numbers = torch.cat([torch.full_like(each[:, :1], i) for i, each in enumerate(boxes)])
        regions, levels = torch.cat([numbers, torch.cat(boxes)], dim=1), self.level_of(boxes)
        out = maps[0].new_zeros(regions.shape[0], maps[0].shape[1], *self.output_size)
        for level, (each, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            read = roi_align(each, regions[chosen].to(each), self.output_size, 1 / stride, aligned=True)
            out[chosen] = read.to(out)
        return out


class BoxPredictor(FastRCNNPredictor):
    """Boxes for the classes only; torchvision's regresses the background's too, which nothing reads.

    Shape: (n, 1024) -> scores (n, classes + 1), deltas (n, 4 (classes + 1)), zeros for the background.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = super().forward(x)
        return scores, F.pad(deltas, (4, 0))


class MaskPredictor(MaskRCNNPredictor):
    """Masks for the classes only.

    Shape: (n, 256, 14, 14) -> (n, classes + 1, 28, 28), zeros for the background.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(256, 256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(x), (0, 0, 0, 0, 1, 0))


class EMOMaskRCNN(Detector, MaskRCNN):
    """torchvision's Mask R-CNN with mmdet's details."""

    first_label, input_size = 1, COUNTED_SIZE

    def dense_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the pyramid, and what the region proposal network makes of them, of normalised images.

        Shape: (B, 3, H, W) -> by level "1" to "4" and "pool" (B, 256, h, w), objectness (B, anchors), deltas
            (B, anchors, 4).
        """
        maps = self.backbone(images)
        outputs = dict(maps)
        for name, levels in zip(("objectness", "deltas"), self.rpn.head(list(maps.values())), strict=True):
            flat = [level.permute(0, 2, 3, 1).flatten(1) for level in levels]  # (B, h w anchors [4])
            outputs[name] = torch.cat(flat, dim=1)
        return outputs | {"deltas": outputs["deltas"].unflatten(1, (-1, 4))}

    def counted_outputs(self, images: Tensor) -> object:
        """`dense_outputs`, then the heads of 1000 regions, and of 100 for their masks, as mmdet counts.

        Shape: (B, 3, H, W).
        """
        heads, channels = self.roi_heads, self.backbone.out_channels
        boxes, masks = images.new_zeros(1000, channels, 7, 7), images.new_zeros(100, channels, 14, 14)
        return self.dense_outputs(images), heads.box_predictor(heads.box_head(boxes)), heads.mask_predictor(
            heads.mask_head(masks)
        )  # fmt: skip


def maskrcnn(
    backbone: str, *, num_classes: int = 80, min_size: int | Sequence[int] = 800, max_size: int = 1333,
    norm_eval: bool = True, frozen_stages: int = 1, backbone_options: Mapping[str, Any] | None = None,
    image_mean: Sequence[float] | None = None, image_std: Sequence[float] | None = None,
) -> EMOMaskRCNN:  # fmt: skip
    """Mask R-CNN on a backbone.

    Args:
        backbone: Name of a classifier.
        num_classes: Classes of objects, without the background.
        min_size, max_size: An image's shorter side becomes the first, unless its longer one would be above the second.
            Of several first ones each training image draws one; the last is for measuring.
        norm_eval: Keep the running statistics of the backbone's batch norms.
        frozen_stages: Stages of the backbone that are not trained, with the stem; 0 trains everything.
        backbone_options: Arguments of `EMO` to replace.
        image_mean, image_std: Of the images, by which they are normalised. Default: ImageNet's; a classifier that was
            trained here has 0.5 for both.
    """
    maps = StageMaps(backbone, (1, 2, 3, 4), frozen=frozen_stages, norm_eval=norm_eval, options=backbone_options)
    model = EMOMaskRCNN(
        Pyramid(maps, LastLevelMaxPool()), None, min_size, max_size, image_mean, image_std,
        rpn_anchor_generator=ExactAnchors((4, 8, 16, 32, 64), (8,), (0.5, 1, 2)), rpn_post_nms_top_n_train=1000,
        box_roi_pool=AlignedRoIAlign(7), box_predictor=BoxPredictor(1024, num_classes),
        mask_roi_pool=AlignedRoIAlign(14), mask_predictor=MaskPredictor(num_classes),
    )
    model.num_classes = num_classes
    return model
