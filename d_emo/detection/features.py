"""The backbone of a detector, as the EMOv1 and EMOv2 papers use it.

Maps are taken behind the stages, without a norm; batch norms keep their running statistics, and attention has a window
of its own, 10 in all detectors of EMOv2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from d_emo.detection.targets import check_targets
from d_emo.models.backbone import EMO, build_backbone
from d_emo.models.layers import batch_norms

WINDOWS = {"emov1_1m": 7, "emov1_2m": 7}
"""Windows of the papers' detectors that are not 10."""


class StageMaps(nn.Module):
    """Maps behind chosen stages of an `EMO`.

    Args:
        backbone: Name of a classifier.
        stages: Which maps, from 1: stage i has a stride of 2^(i + 1).
        frozen: How many stages are not trained, the stem and those before them included; 0 trains everything.
        norm_eval: Keep the running statistics of batch norms; their weights are trained all the same.
        options: Arguments of `EMO` to replace.

    Attributes:
        widths: Channels of the maps.

    Shape: (B, 3, H, W) -> by stage "1" to "4" (B, C, H / stride, W / stride), rounded up.
    """

    def __init__(
        self, backbone: str, stages: Sequence[int], *, frozen: int = 0, norm_eval: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.emo: EMO = build_backbone(backbone, **{"window_size": WINDOWS.get(backbone, 10), **(options or {})})
        self.indices = self.emo.prune_intermediate_layers([stage - 1 for stage in stages], prune_norm=True)
        self.widths = [self.emo.feature_info[index]["num_chs"] for index in self.indices]
        self.frozen, self.norm_eval = ([self.emo.stem, *self.emo.stages[:frozen]] if frozen else []), norm_eval
        for module in self.frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> StageMaps:
        """What is frozen stays in eval mode, and with ``norm_eval`` every batch norm."""
        super().train(mode)
        for module in [*self.frozen, *(batch_norms(self.emo) if self.norm_eval else [])]:
            module.eval()
        return self

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.emo.forward_intermediates(x, self.indices, intermediates_only=True)
        return OrderedDict((str(index + 1), each) for index, each in zip(self.indices, maps, strict=True))


class Pyramid(nn.Module):
    """A feature pyramid of torchvision on the maps of a backbone; as a backbone of torchvision's detectors.

    Shape: (B, 3, H, W) -> by level (B, out_channels, h, w).
    """

    def __init__(
        self, maps: StageMaps, extra: ExtraFPNBlock | None = None, *, out_channels: int = 256,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.maps, self.out_channels = maps, out_channels
        self.fpn = FeaturePyramidNetwork(maps.widths, out_channels, extra, norm)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(self.maps(x))


class Detector(nn.Module):
    """What the detectors here add to torchvision's: what a network computes before its post-processing, and its facts.

    Shape: images 3 x H x W in [0, 1], of any sizes; see torchvision.

    Attributes:
        first_label: Label of the first class; where it is 1, 0 is the background.
        num_classes: Classes of objects, without the background.
        input_size: (height, width) for which the multiply-accumulates are listed.
    """

    in_chans = 3
    first_label: int
    num_classes: int
    input_size: tuple[int, int]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, else what is found in each image; InputError for targets that cannot be trained on."""
        if self.training:
            labels = range(self.first_label, self.first_label + self.num_classes)
            check_targets(images, targets, labels, masks=hasattr(self, "roi_heads"))
        return super().forward(images, targets)

    def dense_outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The heads' outputs of normalised images of one size; anchors are those of ``anchor_generator``, in order.

        Shape: (B, 3, H, W) -> cls_logits (B, anchors, logits), bbox_regression (B, anchors, 4).
        """
        return self.head(list(self.backbone(images).values()))

    def anchors(self, images: ImageList) -> Tensor:
        """The anchors of images of one size. Shape: (B, 3, H, W) -> (anchors, 4)."""
        generator = self.rpn.anchor_generator if hasattr(self, "rpn") else self.anchor_generator
        return generator(images, list(self.backbone(images.tensors).values()))[0]

    def counted_outputs(self, images: Tensor) -> object:
        """What the listed multiply-accumulates are those of. Shape: (B, 3, H, W)."""
        return self.dense_outputs(images)
