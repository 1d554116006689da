"""The networks as the papers' equations read: channels first, one standard operator after the other, nothing clever.

It is what a port of the block looks like before anyone has made it fast, and what "times the plain transcription" means
in the tables. It takes its weights from one of our networks, and the tests hold the two against each other.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo import kernels
from d_emo.models import Denoiser
from d_emo.models.attention import WindowAttention
from d_emo.models.backbone import EMO
from d_emo.models.blocks import AdaLNMobileBlock, MetaMobileBlock, MobileOperator
from d_emo.models.layers import ChannelsLastBatchNorm, LayerScale, LocalConv


def transcribe(network: nn.Module) -> nn.Module:
    """The plain transcription of a D-EMO denoiser or EMOv2 classifier, with a copy of its weights."""
    return {Denoiser: PlainDenoiser, EMO: PlainClassifier}[type(network)](copy.deepcopy(network))


def pointwise(x: Tensor, layer: nn.Linear) -> Tensor:
    """A linear layer as a 1 x 1 convolution. Shape: (B, C, H, W) -> (B, D, H, W)."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    """Batch norm, layer norm over the channels, or none. Shape: (B, C, H, W) -> same."""
    if isinstance(layer, ChannelsLastBatchNorm):
        return layer.bn(x)
    if isinstance(layer, nn.LayerNorm):
        return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
    return x


def windows(x: Tensor, heads: int, window: tuple[int, int], far: bool) -> Tensor:
    """Shape: (B, C, H, W) -> (B, n, m, heads, h w, C / heads)."""
    (h, w), (batch, dim, height, width) = window, x.shape
    n, m = height // h, width // w
    if far:
        x = x.view(batch, heads, dim // heads, h, n, w, m).permute(0, 4, 6, 1, 3, 5, 2)
    else:
        x = x.view(batch, heads, dim // heads, n, h, m, w).permute(0, 3, 5, 1, 4, 6, 2)
    return x.reshape(batch, n, m, heads, h * w, dim // heads)


def unwindow(x: Tensor, window: tuple[int, int], far: bool) -> Tensor:
    """The inverse of `windows`. Shape: (B, n, m, heads, h w, C / heads) -> (B, C, H, W)."""
    (h, w), (batch, n, m, heads, _, width) = window, x.shape
    x = x.view(batch, n, m, heads, h, w, width)
    x = x.permute(0, 3, 6, 4, 1, 5, 2) if far else x.permute(0, 3, 6, 1, 4, 2, 5)
    return x.reshape(batch, heads * width, n * h, m * w)


def attention(part: WindowAttention, u: Tensor) -> Tensor:
    """Eq. 2-4, the window attention of the post order. Shape: (B, C, H, W) -> (B, M, H, W)."""
    height, width = u.shape[2:]
    u = F.pad(u, (0, -width % part.window[1], 0, -height % part.window[0]))  # (B, C, H', W')
    q, k = pointwise(u, part.qk).chunk(2, dim=1)  # 2 x (B, C, H', W')
    v = part.act(pointwise(u, part.v))  # (B, M, H', W')
    total = torch.zeros_like(v)
    for partition in kernels.PARTITIONS[part.mode]:
        far = partition is kernels.FarPartition
        qs, ks, vs = (windows(x, part.num_heads, part.window, far) for x in (q, k, v))  # (B, n, m, heads, T, d or e)
        logits = torch.matmul(qs, ks.transpose(-2, -1)) * qs.shape[-1] ** -0.5  # (B, n, m, heads, T, T)
        total = total + unwindow(torch.matmul(logits.softmax(-1), vs), part.window, far)
    return total[:, :, :height, :width]


def local(part: LocalConv, a: Tensor) -> Tensor:
    """SiLU(BN(DWConv(a))). Shape: (B, M, H, W) -> (B, M, H', W')."""
    conv = part.conv
    a = F.conv2d(a, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.silu(norm(a, part.norm))


def operator(part: MobileOperator, u: Tensor) -> Tensor:
    """The inside of a Meta Mobile Block. Shape: (B, C, H, W) -> (B, C_out, H', W')."""
    if isinstance(part.expand, WindowAttention):
        a = attention(part.expand, u)
    else:
        a = part.expand[1](pointwise(u, part.expand[0]))  # (B, M, H, W)
    y = local(part.local, a)
    return pointwise(a + y if part.inner_skip else y, part.proj)


def mobile_block(block: MetaMobileBlock, x: Tensor) -> Tensor:
    """Shape: (B, C, H, W) -> (B, C_out, H', W')."""
    y = operator(block.operator, norm(x, block.norm))
    if isinstance(block.layer_scale, LayerScale):
        y = y * block.layer_scale.gamma[:, None, None]
    return x + block.drop_path(y) if block.residual else y


def adaln_block(block: AdaLNMobileBlock, x: Tensor, c: Tensor) -> Tensor:
    """Shape: x (B, C, H, W), c (B, C) -> (B, C, H, W)."""
    shift, scale, gate = block.adaLN_modulation(c)[:, :, None, None].chunk(3, dim=1)  # 3 x (B, C, 1, 1)
    return x + gate * operator(block.operator, norm(x, block.norm) * (1 + scale) + shift)


class Plain(nn.Module):
    """Another way through the weights of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class PlainDenoiser(Plain):
    """Shape: latents (B, C_in, H, W), timestep (B,), class_labels (B,) -> (B, C_out, H, W)."""

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        net = self.network
        with kernels.plain():
            x = net.x_embedder.proj(latents)  # (B, C, h, w)
            x = x + net.pos_embed.view(1, *net.grid, -1).permute(0, 3, 1, 2)
            c = net.t_embedder(timestep) + net.y_embedder(class_labels)  # (B, C)
            for block in net.blocks:
                x = adaln_block(block, x, c)
            return net.unpatchify(net.final_layer(x.permute(0, 2, 3, 1), c))


class PlainClassifier(Plain):
    """Shape: (B, C_in, H, W) -> (B, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        net, stem = self.network, self.network.stem
        with kernels.plain():
            x = stem.act(norm(stem.conv.conv(x), stem.conv.norm))  # (B, C, H / 2, W / 2)
            x = pointwise(local(stem.local, x), stem.proj)
            for stage in net.stages:
                for block in stage:
                    x = mobile_block(block, x)
            return net.forward_head(norm(x, net.norm))
