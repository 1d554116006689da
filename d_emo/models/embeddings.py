"""What goes into a denoiser beside its blocks: patches, positions, the timestep and the class, as in the DiT paper."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo.models.layers import Layers


class PatchEmbed(nn.Module):
    """Cut the latent into p x p patches and map each to a token.

    Shape: (B, C_in, H * p, W * p) -> (B, H, W, C).
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


@torch.fx.wrap
def timestep_features(t: Tensor, count: int) -> Tensor:
    """Cosines and sines of the timestep at ``count / 2`` frequencies; float32 whatever the model's dtype: bfloat16 can
    tell only about half of 1000 timesteps apart. Shape: (B,) -> (B, count)."""
    half = count // 2
    powers = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * powers)  # (B, count / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, count)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off on the tensor's device; without data, and while `torch.fx` traces, nothing is cast. Shape: any."""
    if isinstance(x, torch.fx.Proxy) or x.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def patch_resize(old: int, new: int) -> Tensor:
    """The linear map that resizes the values of a patch, bilinearly; B of FlexiViT (Beyer et al., 2023), section 3.4.

    Its pseudoinverse takes the kernel of a patch embedding along, so that a patch and the resized one give the same
    token: exactly so for larger patches, by least squares over patches of independent values for smaller ones (which
    are resized with antialiasing).

    Shape: () -> (new * new, old * old).

    Args:
        old: Side of the patch.
        new: Side of the resized one.
    """
    units = torch.eye(old * old).view(old * old, 1, old, old)
    return F.interpolate(units, size=(new, new), mode="bilinear", antialias=True).flatten(1).T


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep, then a two-layer MLP (DiT, section 3.2).

    Shape: (B,) -> (B, C).
    """

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = Layers(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.num_features)  # (B, 256)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)  # quantised: none
        with full_precision(t):  # a small network that every block depends on
            return self.mlp(features.to(dtype))  # (B, C)


class LabelEmbedder(nn.Module):
    """A table with one row per class and a last row for "no class".

    Shape: (B,) -> (B, C).
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos position embedding in DiT's channel order: the column first, then the row; sines, then cosines.

    Args:
        dim: channels, a multiple of 4.
        grid: (rows, columns) of tokens.

    Shape: -> (1, rows * columns, dim), float32.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in grid)  # (n, dim / 4)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (rows, columns))  # (n, dim / 2)
    both = [columns.expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1)]  # 2 x (rows, columns, dim / 2)
    return torch.cat(both, dim=-1).reshape(1, -1, dim).float()
