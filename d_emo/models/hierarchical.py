"""A denoiser of several resolutions: D-EMO's blocks in a U. Ours, not the papers'.

The papers' D-EMO keeps one resolution, as DiT does. This one spends blocks on a fine map while it is narrow and on wide
channels while the map is small, with skip connections, as the U-Net of DDPM (Ho et al., 2020, appendix B) and, with
DiT's conditioning, U-DiT (Tian et al., 2024) do.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.models.attention import AttentionMode
from d_emo.models.layers import LARGEST_RATIO, NormKind, is_ratio
from d_emo.models.token_denoiser import PositionEmbedding, TokenDenoiser, check_counts

MOST_LEVELS = 8


class Downsample(nn.Module):
    """Four neighbours side by side, and a linear map to the next level's channels.

    Shape: (B, H, W, C) -> (B, H / 2, W / 2, D).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(4 * dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, dim).transpose(2, 3)  # (B, H / 2, W / 2, 2, 2, C)
        return kernels.linear(self.proj, x.flatten(3))


class Upsample(nn.Module):
    """The way back up: four tokens out of each one, and the skip connection beside them, mapped together.

    Shape: x (B, H / 2, W / 2, D), skip (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 4 * out_dim)
        self.fuse = nn.Linear(2 * out_dim, out_dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = kernels.linear(self.proj, x).view(batch, height, width, 2, 2, -1).transpose(2, 3)
        x = x.reshape(skip.shape)  # (B, H, W, C)
        return kernels.linear(self.fuse, torch.cat([x, skip], dim=-1))


class HierarchicalDenoiser(TokenDenoiser):
    """A `Denoiser` in a U: blocks on maps that halve from level to level, and back up beside skip connections.

    Every level halves height and width. All blocks see the same condition, of ``condition_size`` channels. The last
    level's blocks are passed once, those of the others on the way down and, as many others, on the way up.

    Args:
        sample_size: height and width of the latent, one number or (height, width).
        patch_size: side of the square patch that becomes one token of the first level.
        in_channels: channels of the latent.
        out_channels: channels of the output. Leave it out: it follows from ``learn_sigma`` and is recorded in the
            config, because diffusers' pipelines read it there.
        learn_sigma: predict the variance too, which doubles the output channels.
        num_classes: classes without the null class; 1 for unconditional models.
        widths: channels of a token, by level.
        depths: number of blocks, by level; of each way, but for the last level.
        condition_size: channels of the condition.
        head_size: channels of an attention head; divides all widths.
        block: a name of `d_emo.tables.BLOCKS`: "i2rmb" or "dit".
        expand_ratio: width of the value (i2rmb) or of the MLP (dit) over that of a token.
        attention_mode: "near", "far" or "spanning"; this and the next three are for blocks that take them (i2rmb).
        window_size: window of the attention; where the map is smaller than the window it is the whole map.
        kernel_size: kernel of the depthwise convolution.
        local_norm: norm of the depthwise convolution: "batch", "layer" or "none".
        position_embedding: "sincos", the fixed one of DiT, or "none" (all zeros).

    Shape: hidden_states (B, C_in, H, W), timestep () or (B,), class_labels (B,) -> sample (B, C_out, H, W).

    Raises:
        InputError: for a combination that cannot work, and for an input of another size than ``sample_size``.
    """

    @register_to_config
    def __init__(
        self, sample_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
        out_channels: int | None = None, learn_sigma: bool = True, num_classes: int = 1000,
        widths: Sequence[int] = (192, 384, 576), depths: Sequence[int] = (4, 2, 2), condition_size: int = 384,
        head_size: int = 64, block: str = "i2rmb", expand_ratio: float = 4,
        attention_mode: AttentionMode = "spanning", window_size: int | tuple[int, int] = 8, kernel_size: int = 5,
        local_norm: NormKind = "batch", position_embedding: PositionEmbedding = "sincos",
    ) -> None:  # fmt: skip
        super().__init__()
        for name, values in (("widths", widths), ("depths", depths)):
            if not isinstance(values, Sequence) or isinstance(values, str) or not 2 <= len(values) <= MOST_LEVELS:
                raise InputError(f"{name} must be 2 to {MOST_LEVELS} numbers, one for each level, got {values!r}.")
        if len(widths) != len(depths):
            raise InputError(f"widths are of {len(widths)} levels and depths of {len(depths)}.")
        check_counts(condition_size=condition_size, head_size=head_size)
        for width, depth in zip(widths, depths, strict=True):
            check_counts(width=width, depth=depth)
            if width % head_size:
                raise InputError(f"head_size {head_size} does not divide the width {width}.")
        if widths[0] % 4:
            raise InputError(f"The first width must be a multiple of 4 for the position embedding, got {widths[0]}.")
        if not is_ratio(expand_ratio):
            raise InputError(f"expand_ratio must be positive and at most {LARGEST_RATIO}, got {expand_ratio!r}.")
        self._begin(
            sample_size=sample_size, patch_size=patch_size, in_channels=in_channels, out_channels=out_channels,
            learn_sigma=learn_sigma, num_classes=num_classes, dim=widths[0], condition_dim=condition_size,
            position_embedding=position_embedding,
        )  # fmt: skip
        halvings = 2 ** (len(widths) - 1)
        if any(side % halvings for side in self.grid):
            height, width = self.grid
            raise InputError(
                f"{len(widths)} levels halve a map of {height}x{width} tokens {len(widths) - 1} times, which does not "
                "go; choose another patch_size or fewer levels."
            )

        def blocks(level: int) -> nn.ModuleList:
            grid = self.grid[0] >> level, self.grid[1] >> level
            return self._blocks(depths[level], widths[level], widths[level] // head_size, grid, condition_size)

        upper = range(len(widths) - 1)
        self.down_blocks = nn.ModuleList(map(blocks, upper))
        self.downsamplers = nn.ModuleList(Downsample(widths[level], widths[level + 1]) for level in upper)
        self.mid_blocks = blocks(len(upper))
        self.upsamplers = nn.ModuleList(Upsample(widths[level + 1], widths[level]) for level in reversed(upper))
        self.up_blocks = nn.ModuleList(map(blocks, reversed(upper)))
        self._finish(widths[0], condition_size)

    @property
    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        widths, depths, (height, width) = self.config.widths, self.config.depths, self.grid
        levels = [*range(len(widths)), *reversed(range(len(widths) - 1))]
        return tuple(
            (widths[level], height >> level, width >> level) for level in levels for _ in range(depths[level])
        )

    def block_sequence(self) -> list[nn.Module]:
        return [block for blocks in (*self.down_blocks, self.mid_blocks, *self.up_blocks) for block in blocks]

    def trunk(self, x: Tensor, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> Tensor:
        skips = []
        for blocks, downsample in zip(self.down_blocks, self.downsamplers, strict=True):
            x = run(blocks, x)  # (B, H, W, C)
            skips.append(x)
            x = downsample(x)  # (B, H / 2, W / 2, D)
        x = run(self.mid_blocks, x)
        for blocks, upsample in zip(self.up_blocks, self.upsamplers, strict=True):
            x = upsample(x, skips.pop())  # (B, H, W, C)
            x = run(blocks, x)
        return x
