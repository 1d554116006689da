"""RetinaNet of the EMOv1 and EMOv2 papers (table XI), with mmdet's pyramid, anchors and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from d_emo.detection.features import Detector, Pyramid, StageMaps
from d_emo.errors import InputError

COUNTED_SIZE = (800, 1280)
"""(height, width) for which multiply-accumulates of detectors on a pyramid are listed."""


class P6P7(LastLevelP6P7):
    """Two more levels from the backbone's last map; there is no ReLU between them, unlike in torchvision's.

    Shape: maps (B, C, h, w).
    """

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6(c[-1])  # (B, 256, H / 64, W / 64)
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class ExactAnchors(AnchorGenerator):
    """Anchors whose corners are not rounded and whose strides are powers of two, as mmdet's.

    torchvision rounds both: a padded image of 800 px has a 7 px map at stride 128, and 800 / 7 is taken as 114.

    Args:
        strides: Of the levels, in pixels.
        scales: Sides of the square anchors over the stride.
        ratios: Height over width.
    """

    def __init__(self, strides: tuple[int, ...], scales: tuple[float, ...], ratios: tuple[float, ...]) -> None:
        sides = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sides, (ratios,) * len(strides))
        self.strides = strides

    def generate_anchors(
        self, scales: list[float], aspect_ratios: list[float], dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:  # fmt: skip
        """The anchors of a cell, around 0. Shape: -> (anchors, 4)."""
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()[:, None]
        sides = torch.tensor(scales, dtype=dtype, device=device)
        width, height = (sides / root).flatten(), (sides * root).flatten()
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of every image, alike. Shape: -> (anchors, 4) each."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        steps = [[torch.tensor(stride, device=feature_maps[0].device)] * 2 for stride in self.strides]
        levels = self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], steps)
        return [torch.cat(levels)] * len(image_list.image_sizes)


class BatchNormalisedHead(RetinaNetHead):
    """torchvision's head, its losses divided by the objects' anchors of the batch, at least one an image, as mmdet.

    torchvision divides each image's losses by its own.
    """

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Focal loss and L1 loss. Shape: -> () each."""
        shares = [max(1, int((matched >= 0).sum())) for matched in matched_idxs]

        def joint(loss: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
            sums: dict[str, Tensor] = {}
            for i, share in enumerate(shares):
                outputs = {name: value[i : i + 1] for name, value in head_outputs.items()}
                one = loss(targets[i : i + 1], outputs, anchors[i : i + 1], matched_idxs[i : i + 1])
                sums = {name: sums.get(name, 0) + value * (share / sum(shares)) for name, value in one.items()}
            return sums

        return joint(super().compute_loss)


class EMORetinaNet(Detector, RetinaNet):
    """torchvision's RetinaNet with mmdet's details; there is no background among the logits."""

    first_label, input_size = 0, COUNTED_SIZE


def retinanet(
    backbone: str, *, num_classes: int = 80, min_size: int | Sequence[int] = 800, max_size: int = 1333,
    norm_eval: bool = True, frozen_stages: int = 1, pyramid: Literal["published", "small"] = "published",
    backbone_options: Mapping[str, Any] | None = None, image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> EMORetinaNet:  # fmt: skip
    """RetinaNet on a backbone.

    Args:
        backbone: Name of a classifier.
        num_classes: Classes of objects.
        min_size, max_size: An image's shorter side becomes the first, unless its longer one would be above the second.
            Of several first ones each training image draws one; the last is for measuring.
        norm_eval: Keep the running statistics of the backbone's batch norms.
        frozen_stages: Stages of the backbone that are not trained, with the stem; 0 trains everything.
        pyramid: "published" has five levels of 256 channels and four convolutions in each head. "small" is for short
            runs on small pictures: three levels of 64 channels, two convolutions in each head, group norms behind
            all convolutions (maps of a backbone that was trained briefly are of the order of 0.01), and anchors of
            11 px and more, as upright as digits are.
        backbone_options: Arguments of `EMO` to replace.
        image_mean, image_std: Of the images, by which they are normalised. Default: ImageNet's; a classifier that was
            trained here has 0.5 for both.

    Raises:
        InputError: Unknown pyramid.
    """
    if pyramid not in ("published", "small"):
        raise InputError(f"unknown pyramid {pyramid!r}; choose 'published' or 'small'")
    maps = StageMaps(backbone, (2, 3, 4), frozen=frozen_stages, norm_eval=norm_eval, options=backbone_options)
    if pyramid == "published":
        levels = Pyramid(maps, P6P7(maps.widths[-1], 256))
        anchors = ExactAnchors((8, 16, 32, 64, 128), (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)), (0.5, 1, 2))
        head = BatchNormalisedHead(levels.out_channels, anchors.num_anchors_per_location()[0], num_classes)
    else:
        norm = partial(nn.GroupNorm, 8)
        levels = Pyramid(maps, out_channels=64, norm=norm)
        anchors = ExactAnchors((8, 16, 32), (1.4, 1.9, 2.6, 3.6), (1.6,))
        head = BatchNormalisedHead(64, anchors.num_anchors_per_location()[0], num_classes, norm_layer=norm)
        for part in (head.classification_head, head.regression_head):
            part.conv = part.conv[:2]
    model = EMORetinaNet(
        levels, num_classes, min_size, max_size, anchor_generator=anchors, head=head, score_thresh=0.05,
        nms_thresh=0.5, detections_per_img=100, topk_candidates=1000, image_mean=image_mean, image_std=image_std,
    )
    model.num_classes = num_classes
    return model
