"""DeepLabV3, PSPNet, Semantic FPN and SegFormer on EMO backbones, as in table XIII of the EMOv2 paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d_emo.errors import InputError
from d_emo.models.backbone import EMO, build_backbone
from d_emo.models.layers import is_count
from d_emo.segmentation.heads import ASPPHead, FCNHead, FPNHead, Head, MLPHead, PSPHead, SmallFPNHead, resized

torch.fx.wrap("resized")  # torch.fx looks for wrapped functions by module

WINDOWS = {"emov1_1m": 7, "emov1_2m": 7, "emov1_5m": 16}
"""Windows of EMOv1's segmenters in tokens; all of EMOv2's have 10."""


class Segmenter(nn.Module):
    """An EMO without its head, a decode head on its maps, and in training an auxiliary one.

    Args:
        backbone: Name of an `EMO`.
        num_classes: Classes; 150 in ADE20K.
        aux: Add the auxiliary head, an `FCNHead` on the map of stride 16.
        window_size: Of the backbone's attention, in tokens. Default: the papers'.
        drop_rate: Dropout of channels before the classifiers.
        width: Channels of the decode head. Default: the papers'.
        pyramid: "published", or of `SemanticFPN` "small", see `SmallFPNHead`.
        in_channels: Channels of the image.
        backbone_options: More settings of the `EMO`, such as ``drop_path_rate`` and ``output_stride``.

    Shape: (B, in_channels, H, W) -> {"out": (B, num_classes, H, W)}, as torchvision's segmenters give it, and with an
        auxiliary head, in training only, "aux" of the same shape; H and W are free, from 32.

    Raises:
        InputError: Settings that cannot work.
    """

    head: type[Head]
    others: Mapping[str, type[Head]] = {}
    """Heads that are not the papers', by ``pyramid``."""
    frozen = False
    widths: Mapping[str, int] = {}
    """Of the decode head, by backbone; the head's own default for others."""
    input_size = (512, 512)

    def __init__(
        self, backbone: str, num_classes: int = 150, *, aux: bool = False, window_size: int | None = None,
        drop_rate: float = 0.1, width: int | None = None, pyramid: str = "published", in_channels: int = 3,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("num_classes", num_classes), ("width", 1 if width is None else width)):
            if not is_count(value):
                raise InputError(f"{name} must be a positive integer, got {value!r}.")
        heads = {"published": self.head, **self.others}
        if pyramid not in heads:
            raise InputError(f"pyramid must be one of {', '.join(heads)} here, not {pyramid!r}.")
        width = width or self.widths.get(backbone)
        given = {"window_size": window_size or WINDOWS.get(backbone, 10), "in_channels": in_channels}
        self.backbone: EMO = build_backbone(backbone, **given, **(backbone_options or {}), num_classes=0)
        self.backbone.prune_intermediate_layers(prune_norm=True)  # the maps are taken before the last norm
        dims = [info["num_chs"] for info in self.backbone.feature_info]
        self.decoder = heads[pyramid](dims, num_classes, drop_rate=drop_rate, **({"dim": width} if width else {}))
        self.aux = FCNHead(dims, num_classes, drop_rate=drop_rate) if aux else None
        self.num_classes, self.in_chans, self.config = num_classes, in_channels, {}

    def freeze_backbone(self) -> None:
        """Train the heads only; batch norms of the backbone keep their statistics."""
        self.backbone.requires_grad_(False)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Segmenter:
        """As of any module, but a frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def maps(self, x: Tensor) -> list[Tensor]:
        """What the heads choose from. Shape: (B, C, H, W) -> (B, C_i, H / 4, W / 4) and coarser."""
        return self.backbone.forward_intermediates(x, intermediates_only=True)

    def logits(self, x: Tensor) -> dict[str, Tensor]:
        """The heads' own maps, not enlarged. Shape: (B, C, H, W) -> by head (B, num_classes, h, w)."""
        maps = self.maps(x)
        heads = {"out": self.decoder} | ({"aux": self.aux} if self.aux is not None and self.training else {})
        return {name: head([maps[i] for i in head.stages]) for name, head in heads.items()}

    counted_outputs = logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: resized(each, x.shape[2:]) for name, each in self.logits(x).items()}


class DeepLabV3(Segmenter):
    """Atrous spatial pyramid pooling at stride 32: the papers' backbones are not dilated, ``output_stride`` does it."""

    head = ASPPHead


class PSPNet(Segmenter):
    """Pyramid pooling at stride 32."""

    head = PSPHead


class SemanticFPN(Segmenter):
    """A feature pyramid whose maps are summed up at stride 4; the small one is for short runs on small pictures."""

    head, others = FPNHead, {"small": SmallFPNHead}


class SegFormer(Segmenter):
    """All maps at stride 4, side by side."""

    head, widths = MLPHead, {"emov2_1m": 180}
