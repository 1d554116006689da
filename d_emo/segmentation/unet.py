"""U-EMO and the U-Net that it is compared with, for medical images (EMOv2 paper, table XIV).

Stages of two units at widths 64 to 1024, halved by max pooling; up again bilinearly, with a 1 x 1 convolution to the
skip's width. U-EMO has i2RMBs where a stage's input has at least 64 channels, which is everywhere but in the first.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.errors import InputError
from d_emo.kernels.partitions import channels_first, channels_last
from d_emo.models.blocks import MetaMobileBlock, mobile_block
from d_emo.models.layers import checkpoint_block
from d_emo.segmentation.heads import ASPPHead, ConvNormAct, FCNHead, resized
from d_emo.segmentation.networks import Segmenter

torch.fx.wrap("resized")  # torch.fx looks for wrapped functions by module

WIDTHS = 64, 128, 256, 512, 1024
HEAD_DIM = 32


class Units(nn.Sequential):
    """The units of a stage: i2RMBs, or convolutions where there is no window.

    The first one has no shortcut where it changes the width, and its output is multiplied by the layer scale all the
    same: at 1e-6, the released code's, its signal starts below the epsilon of the norm after it.

    Shape: (B, C_in, H, W) -> (B, C, H, W).
    """

    def __init__(self, dim_in: int, dim: int, *, window: int | None, layer_scale: float, depth: int = 2) -> None:
        widths = [dim_in, *[dim] * depth]
        if window is None or dim_in % HEAD_DIM:
            super().__init__(*(ConvNormAct(*pair, 3) for pair in pairwise(widths)))
            return
        super().__init__(*(
            mobile_block(
                "i2rmb", one, other, expand_ratio=2, num_heads=one // HEAD_DIM, window_size=window, local_norm="layer",
                local_act=nn.GELU, layer_scale=layer_scale,
            )
            for one, other in pairwise(widths)
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self[0], MetaMobileBlock):
            return super().forward(x)
        return channels_first(super().forward(channels_last(x)))


class UNetBackbone(nn.Module):
    """Down and up again; the maps on the way up.

    Args:
        in_channels: Channels of the image.
        widths: Channels of the stages.
        window: Of the i2RMBs' attention in tokens; None for convolutions.
        layer_scale: Start value of the i2RMBs' layer scales.

    Shape: (B, in_channels, H, W) -> maps of (B, widths[-2], H / 8, W / 8) to (B, widths[0], H, W), with five widths.
    """

    def __init__(
        self, in_channels: int = 3, widths: tuple[int, ...] = WIDTHS, *, window: int | None = None,
        layer_scale: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        self.window, self.grad_checkpointing = window, False
        options = {"window": window, "layer_scale": layer_scale}
        first = Units(in_channels, widths[0], window=None, layer_scale=layer_scale)
        self.down = nn.ModuleList([first, *(Units(*pair, **options) for pair in pairwise(widths))])
        upward = list(pairwise(reversed(widths)))
        self.narrow = nn.ModuleList(ConvNormAct(*pair) for pair in upward)
        self.up = nn.ModuleList(Units(2 * dim, dim, **options) for _, dim in upward)
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (len(widths) - 2 - i), "module": f"up.{i}"}
            for i, (_, dim) in enumerate(upward)
        ]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training; batch-norm statistics are still updated once per step."""
        self.grad_checkpointing = enable

    def run(self, units: Units, x: Tensor) -> Tensor:
        """A stage, under gradient checkpointing where that is on. Shape: as its own."""
        again = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        return checkpoint_block(units, x) if again else units(x)

    def forward(self, x: Tensor) -> list[Tensor]:
        skips: list[Tensor] = []
        for i, units in enumerate(self.down):
            x = self.run(units, F.max_pool2d(x, 2) if i else x)  # (B, C_i, H / 2^i, W / 2^i)
            skips.append(x)
        maps = [skips.pop()]
        for narrow, units, skip in zip(self.narrow, self.up, reversed(skips), strict=True):
            x = narrow(resized(maps[-1], skip.shape[2:]))  # (B, C_i, H / 2^i, W / 2^i)
            maps.append(self.run(units, torch.cat([skip, x], dim=1)))
        return maps[1:]


class UNet(Segmenter):
    """A U-Net whose last map goes through a small atrous pyramid, with U-EMO's blocks or convolutions.

    Args:
        num_classes: Classes; 2 in the papers' fundus images.
        aux: Add the auxiliary head, an `FCNHead` on the map of half the image's size.
        window_size: Of the attention in tokens; None for the convolutional network.
        layer_scale: Start value of the layer scales; the released code has 1e-6, with which most units start deaf.
        drop_rate: Dropout of channels before the classifiers.
        in_channels: Channels of the image.
        widths: Channels of the five stages.

    Shape: (B, in_channels, H, W) -> {"out": (B, num_classes, H, W)}; in training "aux" too, if it is there.

    Raises:
        InputError: Settings that cannot work.
    """

    def __init__(
        self, num_classes: int = 2, *, aux: bool = False, window_size: int | None = None, layer_scale: float = 1e-6,
        drop_rate: float = 0.1, in_channels: int = 3, widths: tuple[int, ...] = WIDTHS,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        if len(widths) != 5 or any(width % HEAD_DIM for width in widths):
            raise InputError(f"widths must be five multiples of {HEAD_DIM}, the width of a head, got {widths!r}.")
        self.backbone = UNetBackbone(in_channels, tuple(widths), window=window_size, layer_scale=layer_scale)
        dims = [info["num_chs"] for info in self.backbone.feature_info]
        self.decoder = ASPPHead(dims, num_classes, dim=16, drop_rate=drop_rate)
        self.aux = FCNHead(dims, num_classes, dim=64, drop_rate=drop_rate) if aux else None
        self.num_classes, self.in_chans, self.config = num_classes, in_channels, {}

    def maps(self, x: Tensor) -> list[Tensor]:
        return self.backbone(x)
