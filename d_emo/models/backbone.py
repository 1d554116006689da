"""The EMOv1 and EMOv2 image classifiers.

Sources: EMOv2 paper, section III and tables V and XX; EMOv1 paper, tables 4 and 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d_emo.config import InputError
from d_emo.models.blocks import mobile_block
from d_emo.models.layers import NORM_EPS, ChannelsLastBatchNorm, LocalConv, checkpoint_block, pair

STAGE_NORMS = ("batch", "batch", "layer", "layer")
STAGE_ATTENTION = (False, False, True, True)


def row(
    block: str, depths: str, dims: str, expand_ratios: str, head_dims: str, drop_path_rate: float
) -> dict[str, Any]:
    """One line of the papers' tables as constructor arguments."""
    return {
        "block": block,
        "depths": tuple(map(int, depths.split())),
        "dims": tuple(map(int, dims.split())),
        "expand_ratios": tuple(map(float, expand_ratios.split())),
        "head_dims": tuple(map(int, head_dims.split())),
        "kernel_sizes": (5, 5, 5, 5) if block == "i2rmb" else (3, 3, 5, 5),
        "drop_path_rate": drop_path_rate,
    }


BACKBONES: dict[str, dict[str, Any]] = {
    "emov1_1m": row("irmb", "2 2 8 3", "32 48 80 168", "2 2.5 3 3.5", "16 16 20 21", 0.04036),
    "emov1_2m": row("irmb", "3 3 9 3", "32 48 120 200", "2 2.5 3 3.5", "16 16 20 20", 0.05),
    "emov1_5m": row("irmb", "3 3 9 3", "48 72 160 288", "2 3 4 4", "24 24 32 32", 0.05),
    "emov1_6m": row("irmb", "3 3 9 3", "48 72 160 320", "2 3 4 5", "16 24 20 32", 0.05),
    # The last two of EMOv1 were never released: head widths and drop path are our choice.
    "emov1_10m": row("irmb", "3 4 9 3", "64 96 224 384", "2 3 4 5", "16 24 28 32", 0.1),
    "emov1_20m": row("irmb", "3 4 12 3", "64 128 320 448", "2 3 4 5", "16 32 32 32", 0.1),
    "emov2_1m": row("i2rmb", "2 2 8 3", "32 48 80 180", "2 2.5 3 3.5", "16 16 20 20", 0.04036),
    "emov2_2m": row("i2rmb", "3 3 9 3", "32 48 120 200", "2 2.5 3 3.5", "16 16 20 20", 0.05),
    "emov2_5m": row("i2rmb", "3 3 9 3", "48 72 160 288", "2 3 4 4", "16 24 32 32", 0.05),
    "emov2_20m": row("i2rmb", "3 3 13 3", "64 128 320 448", "2 3 4 4", "16 32 32 32", 0.1),
    "emov2_50m": row("i2rmb", "5 8 20 7", "64 128 384 512", "2 3 4 4", "16 32 32 32", 0.2),
}
"""Every named classifier as the constructor arguments that make it."""


class ConvNorm(nn.Module):
    """The first layer: 3 x 3 convolution of stride 2 with bias, then batch norm; from image layout to channels-last.

    Shape: (B, C_in, H, W) -> (B, ceil(H / 2), ceil(W / 2), C).
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.norm = ChannelsLastBatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


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
        return x * self.conv_expand(self.act(self.conv_reduce(mean))).sigmoid()


class Stem(nn.Module):
    """Strided convolution, depthwise convolution, pointwise projection; EMOv1 has a squeeze-excite and one SiLU less.

    Shape: (B, C_in, H, W) -> (B, ceil(H / 2), ceil(W / 2), C).
    """

    def __init__(self, in_channels: int, dim: int, *, first_act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, dim)
        self.act = first_act
        self.local = LocalConv(dim, kernel_size=3)
        self.gate = gate
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))  # (B, H', W', C)
        return self.proj(self.gate(self.local(x)))  # (B, H', W', C)


def make_stage(
    stage: int,
    dim_in: int,
    *,
    block: str,
    depth: int,
    dim: int,
    expand_ratio: float,
    head_dim: int,
    kernel_size: int,
    window_size: tuple[int, int],
    drop_paths: Sequence[float],
) -> nn.Sequential:
    """A down-sampling block and ``depth - 1`` blocks that keep the map; stages count from 0."""
    if STAGE_ATTENTION[stage] and dim % head_dim:
        raise InputError(f"Width {dim} of stage {stage + 1} is not divisible by the head width {head_dim}.")
    return nn.Sequential(
        *(
            mobile_block(
                block, dim if i else dim_in, dim, stride=1 if i else 2, norm=STAGE_NORMS[stage],
                attention=STAGE_ATTENTION[stage], num_heads=max(1, dim // head_dim), expand_ratio=expand_ratio,
                kernel_size=kernel_size, window_size=window_size, drop_path=drop_paths[i],
            )
            for i in range(depth)
        )
    )  # fmt: skip


class EMO(nn.Module):
    """EMOv1 (iRMB) or EMOv2 (i2RMB): a stem, four stages of mobile blocks, LayerNorm, mean over positions, linear head.

    Args:
        block: "i2rmb" for EMOv2, "irmb" for EMOv1.
        depths, dims, expand_ratios, head_dims, kernel_sizes: one entry per stage.
        num_classes: outputs of the head; 0 leaves the head out.
        in_channels: channels of the image.
        window_size: window of the attention in tokens; a map it does not divide is padded, smaller ones included.
            Published: 7 at 224 px, 8 at 256 and 512 px.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: (B, in_channels, H, W) -> (B, num_classes); H and W are free.

    Raises:
        InputError: for a combination that cannot work.
    """

    def __init__(
        self,
        block: Literal["irmb", "i2rmb"] = "i2rmb",
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (48, 72, 160, 288),
        expand_ratios: Sequence[float] = (2, 3, 4, 4),
        head_dims: Sequence[int] = (16, 24, 32, 32),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        num_classes: int = 1000,
        in_channels: int = 3,
        window_size: int | tuple[int, int] = 7,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        rows = {
            "depths": depths, "dims": dims, "expand_ratios": expand_ratios, "head_dims": head_dims,
            "kernel_sizes": kernel_sizes,
        }  # fmt: skip
        check_rows(**rows)
        if not isinstance(in_channels, int) or in_channels < 1:
            raise InputError(f"in_channels must be a positive integer, got {in_channels!r}.")
        if not 0 <= drop_path_rate < 1:
            raise InputError(f"drop_path_rate must be in [0, 1), got {drop_path_rate!r}.")
        if block == "i2rmb":
            stem_dim, first_act, gate = dims[0] // 2, nn.SiLU(), nn.Identity()
        elif block == "irmb":
            stem_dim, first_act, gate = 24, nn.Identity(), SqueezeExcite(24)
        else:
            raise InputError(f"Unknown block {block!r}; choose 'i2rmb' (EMOv2) or 'irmb' (EMOv1).")
        self.block, self.config, self.grad_checkpointing = block, {}, False
        self.stem = Stem(in_channels, stem_dim, first_act=first_act, gate=gate)
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.stages = nn.ModuleList(
            make_stage(
                stage, dim_in, block=block, window_size=pair(window_size, "window_size"),
                drop_paths=drop_paths[stage].tolist(), **{name.rstrip("s"): row[stage] for name, row in rows.items()},
            )
            for stage, dim_in in enumerate((stem_dim, *dims[:-1]))
        )  # fmt: skip
        self.num_features = dims[-1]
        self.feature_info = [  # timm's description of the four maps
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes removes it. ``global_pool`` is timm's and has one value, "avg"."""
        if not isinstance(num_classes, int) or num_classes < 0:
            raise InputError(f"num_classes must be a positive integer, or 0 for no head, got {num_classes!r}.")
        if global_pool not in (None, "avg"):
            raise InputError(f"EMO pools by the mean over positions ('avg'), not by {global_pool!r}.")
        self.num_classes = num_classes
        self.head = nn.Identity()
        if self.config:
            self.config["num_classes"] = num_classes
        if num_classes:
            like = self.stem.proj.weight
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training; batch-norm statistics are still updated once per step."""
        self.grad_checkpointing = enable

    def run_stage(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        """Shape: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C')."""
        for block in stage:
            x = checkpoint_block(block, x) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map after the last stage.

        Shape: (B, in_channels, H, W) -> (B, C, H / 32, W / 32), rounded up.
        """
        x = self.stem(x)  # (B, H / 2, W / 2, C_stem)
        for stage in self.stages:
            x = self.run_stage(stage, x)  # (B, H / 4, W / 4, C_1) ... (B, H / 32, W / 32, C_4)
        return self.norm(x).permute(0, 3, 1, 2)  # (B, C_4, H / 32, W / 32)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map and classify it.

        Shape: (B, C, H, W) -> (B, num_classes), or (B, C) with ``pre_logits``.
        """
        x = x.mean(dim=(2, 3))  # (B, C)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after chosen stages, in timm's form; ``norm`` applies the final norm to the last stage's map."""
        if output_fmt != "NCHW":
            raise InputError(f"EMO returns feature maps as NCHW, not {output_fmt!r}.")
        wanted = self.stage_indices(indices)
        stages = self.stages[: max(wanted) + 1] if stop_early else self.stages
        maps = []
        x = self.stem(x)  # (B, H / 2, W / 2, C_stem)
        for i, stage in enumerate(stages):
            x = self.run_stage(stage, x)  # (B, H', W', C_i)
            if i in wanted:
                last = norm and i == len(self.stages) - 1
                maps.append((self.norm(x) if last else x).permute(0, 3, 1, 2))  # (B, C_i, H', W')
        if intermediates_only:
            return maps
        return (self.norm(x) if len(stages) == len(self.stages) else x).permute(0, 3, 1, 2), maps

    def stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Read timm's ``indices``: None means all stages, an integer the last so many, negatives count from the end."""
        count = len(self.stages)
        chosen = range(count) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        wanted = sorted({i + count if i < 0 else i for i in chosen})
        if not wanted or wanted[0] < 0 or wanted[-1] >= count:
            raise InputError(f"Stage indices must lie in 0..{count - 1}, got {indices!r}.")
        return wanted

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need, as timm's ``features_only`` asks; returns the chosen stages."""
        wanted = self.stage_indices(indices)
        self.stages = self.stages[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted


def check_rows(**rows: Sequence[float]) -> None:
    """Raise InputError naming the first row that is not four positive numbers."""
    for name, values in rows.items():
        if not isinstance(values, Sequence) or len(values) != 4 or any(v <= 0 for v in values):
            raise InputError(f"{name} must hold four positive numbers, one per stage, got {values!r}.")


def build_backbone(name: str, **overrides: Any) -> EMO:
    """The classifier called ``name`` with some settings replaced; its ``config`` rebuilds it through create_model."""
    model = EMO(**{**BACKBONES[name], **overrides})
    model.config = {"name": name, **overrides, "num_classes": model.num_classes}
    return model
