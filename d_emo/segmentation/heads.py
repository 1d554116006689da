"""Decode heads of the papers' segmenters, with the layers and widths that their parameter counts belong to.

Sources: EMOv2 paper, table XIII; EMOv1 paper's segmentation table; DeepLabV3 (arXiv:1706.05587), PSPNet
(arXiv:1612.01105), Panoptic Feature Pyramid Networks (arXiv:1901.02446), SegFormer (arXiv:2105.15203).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation

from d_emo.errors import InputError


class ConvNormAct(Conv2dNormActivation):
    """A convolution without bias that keeps the map's size, batch norm, ReLU.

    Shape: (B, C_in, h, w) -> (B, C_out, h, w).
    """

    def __init__(self, dim_in: int, dim: int, kernel_size: int = 1, *, dilation: int = 1) -> None:
        super().__init__(dim_in, dim, kernel_size, dilation=dilation)

    def fold_norm(self) -> None:
        """Absorb the batch norm into the convolution."""
        if isinstance(self[1], nn.BatchNorm2d):
            self[0], self[1] = fuse_conv_bn_eval(self[0], self[1]), nn.Identity()


@torch.fx.wrap
def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """A map at another size, bilinearly, the corners not aligned; one node of a `torch.fx` graph.

    Shape: (B, C, h, w) -> (B, C, *size).
    """
    sides = list(zip(x.shape[2:], size, strict=True))
    if any(isinstance(side, torch.SymInt) for each in sides for side in each):
        # free sides of an exported network are not asked, as each answer would be a demand on them
        same = all(statically_known_true(one == other) for one, other in sides)
    else:
        same = x.shape[2:] == torch.Size(size)
    return x if same else F.interpolate(x, size=list(size), mode="bilinear")


@torch.fx.wrap
def part_means(x: Tensor, parts: int) -> Tensor:
    """Means over parts x parts of a map, as adaptive pooling has them; one node of a `torch.fx` graph.

    Where torch.export leaves the sides free, two weighted sums do it: of adaptive pooling ONNX wants the sides.

    Shape: (B, C, h, w) -> (B, C, parts, parts).
    """
    if not any(isinstance(side, torch.SymInt) for side in x.shape[2:]):
        return F.adaptive_avg_pool2d(x, parts)
    rows, columns = (_shares(side, parts, x) for side in x.shape[2:])  # (parts, h), (parts, w)
    x = (rows[:, :, None] * x[:, :, None]).sum(dim=3)  # (B, C, parts, w); a matrix product would ask for the sides
    return (x[:, :, :, None] * columns).sum(dim=4)


def _shares(length: int, parts: int, like: Tensor) -> Tensor:
    """What each cell of an axis weighs in each part. Shape: -> (parts, length)."""
    part, cell = torch.arange(parts, device=like.device)[:, None], torch.arange(length, device=like.device)
    inside = (cell >= part * length // parts) & (cell < ((part + 1) * length + parts - 1) // parts)
    return inside.to(like) / inside.sum(dim=1, keepdim=True)


class Head(nn.Module, ABC):
    """Maps of the backbone to logits: what a subclass makes of them, dropout, a 1 x 1 convolution with bias.

    Args:
        dim: Channels of what the subclass makes.
        num_classes: Channels of the logits.
        drop_rate: Of whole channels before the classifier, in training.

    Shape: maps of (B, C_i, h_i, w_i) -> logits (B, num_classes, h, w).

    Attributes:
        stages: The stages of the backbone, from 0, whose maps it takes.
    """

    stages: tuple[int, ...]

    def __init__(self, dim: int, num_classes: int, *, drop_rate: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(drop_rate)
        self.classifier = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    @abstractmethod
    def features(self, maps: list[Tensor]) -> Tensor:
        """What the classifier looks at. Shape: maps of (B, C_i, h_i, w_i) -> (B, dim, h, w)."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classifier(self.dropout(self.features(maps)))


class FCNHead(Head):
    """One 3 x 3 convolution on the map of stride 16: the auxiliary head of DeepLabV3 and PSPNet."""

    stages = (2,)

    def __init__(self, dims: Sequence[int], num_classes: int, *, dim: int = 256, drop_rate: float) -> None:
        super().__init__(dim, num_classes, drop_rate=drop_rate)
        self.conv = ConvNormAct(dims[2], dim, 3)

    def features(self, maps: list[Tensor]) -> Tensor:
        return self.conv(maps[0])


class ASPPHead(Head):
    """DeepLabV3's atrous spatial pyramid pooling on the last map: 1 x 1, three dilated 3 x 3, the image's mean."""

    stages = (3,)

    def __init__(
        self, dims: Sequence[int], num_classes: int, *, dim: int = 256, rates: Sequence[int] = (12, 24, 36),
        drop_rate: float,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_classes, drop_rate=drop_rate)
        self.pool = ConvNormAct(dims[3], dim)
        branches = [ConvNormAct(dims[3], dim), *(ConvNormAct(dims[3], dim, 3, dilation=rate) for rate in rates)]
        self.branches = nn.ModuleList(branches)
        self.merge = ConvNormAct(dim * (len(branches) + 1), dim, 3)

    def features(self, maps: list[Tensor]) -> Tensor:
        x = maps[0]  # (B, C_4, h, w)
        each = [branch(x) for branch in self.branches]  # (B, dim, h, w)
        mean = self.pool(x.mean(dim=(2, 3), keepdim=True)).expand_as(each[0])
        return self.merge(torch.cat([mean, *each], dim=1))


class PSPHead(Head):
    """PSPNet's pyramid pooling on the last map: means over 1, 2 x 2, 3 x 3 and 6 x 6 parts, beside the map itself."""

    stages = (3,)

    def __init__(
        self, dims: Sequence[int], num_classes: int, *, dim: int = 256, parts: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_classes, drop_rate=drop_rate)
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvNormAct(dims[3], dim)) for n in parts)
        self.merge = ConvNormAct(dims[3] + dim * len(parts), dim, 3)

    def features(self, maps: list[Tensor]) -> Tensor:
        x = maps[0]  # (B, C_4, h, w)
        parts = [conv(part_means(x, pool.output_size)) for pool, conv in self.pools]  # (B, dim, n, n)
        return self.merge(torch.cat([x, *(resized(part, x.shape[2:]) for part in parts)], dim=1))


class FPNHead(Head):
    """Semantic FPN: every map of the pyramid up to stride 4 by convolutions and bilinear doublings, then their sum."""

    stages = (0, 1, 2, 3)

    def __init__(
        self, dims: Sequence[int], num_classes: int, *, dim: int = 128, neck_dim: int = 256, drop_rate: float
    ) -> None:
        super().__init__(dim, num_classes, drop_rate=drop_rate)
        self.neck = FeaturePyramidNetwork(list(dims), neck_dim)
        self.scales = nn.ModuleList(
            nn.ModuleList(ConvNormAct(dim if i else neck_dim, dim, 3) for i in range(max(1, doublings)))
            for doublings in range(len(dims))
        )

    def features(self, maps: list[Tensor]) -> Tensor:
        levels = list(self.neck({str(i): x for i, x in enumerate(maps)}).values())  # (B, neck_dim, h_i, w_i)
        size, total = levels[0].shape[2:], 0
        for doublings, (convs, x) in enumerate(zip(self.scales, levels, strict=True)):
            for i, conv in enumerate(convs):
                x = conv(x)
                if doublings:  # the sizes of the maps themselves, which are no halves of each other where sides are odd
                    x = resized(x, levels[doublings - 1 - i].shape[2:])
            total = total + resized(x, size)
        return total  # (B, dim, h_1, w_1)


class SmallFPNHead(Head):
    """A pyramid for short runs on small pictures: a 3 x 3 convolution on each of its maps, then their sum at stride 4.

    Group norms stand behind all convolutions: they take out a picture's own contrast and the scale of the maps, which a
    backbone that was trained briefly leaves at 0.01.

    Raises:
        InputError: A width that is no multiple of the groups.
    """

    stages = (0, 1, 2, 3)
    groups = 8

    def __init__(self, dims: Sequence[int], num_classes: int, *, dim: int = 64, drop_rate: float) -> None:
        if dim % self.groups:
            raise InputError(f"width must be a multiple of {self.groups}, the groups of its norms, got {dim!r}.")
        super().__init__(dim, num_classes, drop_rate=drop_rate)
        norm = partial(nn.GroupNorm, self.groups)
        self.neck = FeaturePyramidNetwork(list(dims), dim, norm_layer=norm)
        self.convs = nn.ModuleList(Conv2dNormActivation(dim, dim, 3, norm_layer=norm) for _ in dims)

    def features(self, maps: list[Tensor]) -> Tensor:
        levels = self.neck({str(i): x for i, x in enumerate(maps)}).values()  # (B, dim, h_i, w_i)
        each = [resized(conv(x), maps[0].shape[2:]) for conv, x in zip(self.convs, levels, strict=True)]
        return torch.stack(each).sum(dim=0)  # (B, dim, h_1, w_1)


class MLPHead(Head):
    """SegFormer's: each map to the same channels by 1 x 1, all at stride 4 side by side, and 1 x 1 again.

    The papers' form of it has batch norm and ReLU behind each 1 x 1, where SegFormer's own has a linear layer.
    """

    stages = (0, 1, 2, 3)

    def __init__(self, dims: Sequence[int], num_classes: int, *, dim: int = 288, drop_rate: float) -> None:
        super().__init__(dim, num_classes, drop_rate=drop_rate)
        self.laterals = nn.ModuleList(ConvNormAct(dim_in, dim) for dim_in in dims)
        self.merge = ConvNormAct(dim * len(dims), dim)

    def features(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        each = [resized(lateral(x), size) for lateral, x in zip(self.laterals, maps, strict=True)]
        return self.merge(torch.cat(each, dim=1))  # (B, dim, h_1, w_1)
