"""The stems of EMOv1 and EMOv2, as the papers have them: from an image to the first feature map."""

import torch
from torch import Tensor, nn

from d_emo import kernels
from d_emo.kernels.partitions import channels_first, channels_last
from d_emo.models.layers import LIBRARY, ChannelsLastBatchNorm, LocalConv


class ConvNorm(nn.Module):
    """The first layer: 3 x 3 convolution of stride 2 with bias, then batch norm; from image layout to channels-last.

    Shape: (B, C_in, H, W) -> (B, ceil(H / 2), ceil(W / 2), C); with three ``spatial_dims`` (B, C_in, T, H, W) likewise.
    """

    def __init__(self, in_channels: int, dim: int, spatial_dims: int = 2) -> None:
        super().__init__()
        self.conv = LIBRARY[spatial_dims][0](in_channels, dim, 3, stride=2, padding=1)
        self.norm = ChannelsLastBatchNorm(dim, spatial_dims)
        self.layout = torch.channels_last_3d if spatial_dims == 3 else torch.channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.layout)
        return self.norm(channels_last(self.conv(x)))

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Absorb the batch norm's running statistics into the convolution, if nothing hangs on them."""
        if isinstance(self.norm, ChannelsLastBatchNorm) and not kernels.opaque(self.conv, self.norm, self.norm.bn):
            factor, offset = self.norm.affine()
            self.conv.weight.mul_(factor.view(-1, *[1] * (self.conv.weight.ndim - 1)))
            self.conv.bias.mul_(factor).add_(offset)
            self.norm = nn.Identity()


class SqueezeExcite(nn.Module):
    """Channel gates from the mean over positions, with no reduction.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Linear(dim, dim)
        self.act = nn.SiLU()
        self.conv_expand = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        return x * kernels.linear(self.conv_expand, self.act(kernels.linear(self.conv_reduce, mean))).sigmoid()


class Stem(nn.Module):
    """Strided convolution, depthwise convolution, pointwise projection; EMOv1 has a squeeze-excite and one SiLU less.

    Shape: (B, C_in, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)); with three ``spatial_dims`` (B, C_in, T, H, W) likewise.
    """

    def __init__(
        self, in_channels: int, dim: int, *, first_act: nn.Module, gate: nn.Module, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, dim, spatial_dims)
        self.act = first_act
        self.local = LocalConv(dim, kernel_size=3, spatial_dims=spatial_dims)
        self.gate = gate
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))  # (B, H', W', C)
        return channels_first(kernels.linear(self.proj, self.gate(self.local(x))))  # (B, C, H', W')
