"""The EMOv1 and EMOv2 image classifiers.

Sources: EMOv2 paper, section III and tables V and XX; EMOv1 paper, tables 4 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.kernels.partitions import channels_first, channels_last
from d_emo.models.attention import AttentionMode, AttentionOrder
from d_emo.models.blocks import Arrangement, mobile_block
from d_emo.models.layers import (
    LARGEST_COUNT,
    LARGEST_RATIO,
    MOST_BLOCKS,
    NORM_EPS,
    NormKind,
    checkpoint_block,
    fold_batch_norms,
    is_count,
    is_ratio,
    pair,
    sizes,
)
from d_emo.models.stem import SqueezeExcite, Stem

REDUCTION = 32
"""Pixels of the image for one token of the last stage's map, in each direction, unless it is dilated."""

OUTPUT_STRIDES = (8, 16, REDUCTION)


def row(
    block: str, depths: str, dims: str, expand_ratios: str, head_dims: str, drop_path_rate: float
) -> dict[str, Any]:
    """One line of the papers' tables as constructor arguments."""
    counts = {"depths": depths, "dims": dims, "head_dims": head_dims}
    return {
        "block": block, "drop_path_rate": drop_path_rate,
        "kernel_sizes": (5, 5, 5, 5) if block == "i2rmb" else (3, 3, 5, 5),
        "expand_ratios": tuple(map(float, expand_ratios.split())),
        **{name: tuple(map(int, values.split())) for name, values in counts.items()},
    }  # fmt: skip


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


def window_for(img_size: int | tuple[int, int]) -> int:
    """The window for images of a size: one that divides the last two stages' maps, up to 8 and as near to it as can be.

    That is 7 at 224 px, and 8 at 256 and 512 px, as published. Where no window of 5 to 8 divides the maps it is 7, and
    the maps are padded; maps below 5 tokens get a window of their own size.

    Args:
        img_size: pixels, one number or (height, width).

    Raises:
        InputError: below 32 px.
    """
    size = pair(img_size, "img_size")
    if min(size) < REDUCTION:
        raise InputError(f"img_size must be at least {REDUCTION} px, the stride of the last map, got {img_size!r}.")
    last = [-(-n // REDUCTION) for n in size]
    if max(last) < 5:
        return max(2, *last)
    return next((window for window in (8, 7, 6, 5) if not any(n % window for n in last)), 7)


class Stage(nn.Sequential):
    """A down-sampling block, then blocks that keep the map.

    What goes in and out has the channels first, as a view: whoever takes a stage's map (timm, torchvision) wants it so.

    Attributes:
        grad_checkpointing: Whether blocks are computed again in the backward pass.

    Shape: (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)).
    """

    grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)  # (B, H, W, C)
        again = self.grad_checkpointing and torch.is_grad_enabled()
        for block in self:
            x = checkpoint_block(block, x) if again else block(x)  # (B, H', W', C')
        return channels_first(x)  # (B, C', H', W')


class Stages(nn.Sequential):
    """One stage after the other. Shape: (B, C, H, W) -> (B, C', H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        for stage in self:
            x = run_stage(stage, x)
        return x


def run_stage(stage: Stage, x: Tensor) -> Tensor:
    """A stage, in inference a few images at a time. Shape: (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2))."""
    if stage.training:  # batch norm takes its statistics from all images
        return stage(x)
    return kernels.in_slices(stage, x, math.prod(x.shape[2:]) * stage[0].operator.mid_dim)


def make_stage(
    stage: int, dim_in: int, *, block: str, depth: int, dim: int, head_dim: int, attention: bool,
    drop_paths: Sequence[float], output_stride: int, dilation: int, spatial_dims: int = 2, **options: Any,
) -> Stage:  # fmt: skip
    """A stage (from 0) of ``depth`` blocks; InputError if its width is no multiple of the head width.

    A stage beyond ``output_stride`` keeps the map: in place of the stride that it and stages before it lack, its
    convolutions are dilated, the first by what was missing before.
    """
    if attention and dim % head_dim:
        raise InputError(f"Width {dim} of stage {stage + 1} is not divisible by the head width {head_dim}.")
    heads, missing = max(1, dim // head_dim), max(1, 2 ** (stage + 2) // output_stride)
    down = 2 if spatial_dims == 2 else (1, 2, 2)  # of a video's frames only the stem leaves some out
    first = {"stride": down if missing == 1 else 1, "down": True, "dilation": max(1, missing // 2)}
    return Stage(*(
        mobile_block(block, dim if i else dim_in, dim, attention=attention, num_heads=heads, drop_path=drop_paths[i],
                     spatial_dims=spatial_dims, **({"dilation": dilation * missing} if i else first), **options)
        for i in range(depth)
    ))  # fmt: skip


class EMO(nn.Module):
    """EMOv1 (iRMB) or EMOv2 (i2RMB): a stem, four stages of mobile blocks, LayerNorm, mean over positions, linear head.

    Args:
        block: "i2rmb" for EMOv2, "irmb" for EMOv1.
        depths, dims, expand_ratios, head_dims, kernel_sizes: one entry per stage.
        num_classes: outputs of the head; 0 leaves the head out.
        in_channels: channels of the image.
        img_size: pixels of the images to come, for the choice of the window; any other size works too.
        window_size: window of the attention in tokens; a map it does not divide is padded, smaller ones included.
            Default: `window_for` the image size.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        global_pool: "avg", or "" to give the head every position.
        dilations: of the depthwise convolutions, one entry per stage; the strided ones are never dilated.
        norms: of the blocks, one entry per stage; a layer norm goes with GELU, a batch norm with SiLU.
        attention_stages: stages with attention, from 1; a stage's first block never has it.
        attention_mode: "none", "near", "far" or "spanning". Default: the block's.
        attention_order: "post" or "pre". Default: the block's.
        arrangement: "attention-conv" (cascade), "conv-attention" or "parallel".
        layer_scale: start value of the layer scales. Default: the block's, 1e-6 for EMOv2 and none for EMOv1. With 1e-6
            the stages' maps start a million times smaller than what a norm behind them expects.
        output_stride: 32; with 16 or 8 the last stage or two keep the map and are dilated instead, with the same
            weights. Windows have as many tokens as before.
        spatial_dims: 2 for images; 3 for videos, with kernels in all three directions (V-EMO): the stem's stride halves
            the frames too, the stages' do not, and the window is (frames, height, width), two frames unless given.

    Shape: (B, in_channels, H, W) -> (B, num_classes); H and W are free. Videos: (B, in_channels, T, H, W).

    Raises:
        InputError: for a combination that cannot work.
    """

    def __init__(
        self, block: Literal["irmb", "i2rmb"] = "i2rmb", depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (48, 72, 160, 288), expand_ratios: Sequence[float] = (2, 3, 4, 4),
        head_dims: Sequence[int] = (16, 24, 32, 32), kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        num_classes: int = 1000, in_channels: int = 3, img_size: int | tuple[int, int] = 224,
        window_size: int | tuple[int, ...] | None = None, drop_rate: float = 0.0, drop_path_rate: float = 0.0,
        global_pool: str = "avg", dilations: Sequence[int] = (1, 1, 1, 1),
        norms: Sequence[NormKind] = ("batch", "batch", "layer", "layer"), attention_stages: Sequence[int] = (3, 4),
        attention_mode: AttentionMode | Literal["none"] | None = None, attention_order: AttentionOrder | None = None,
        arrangement: Arrangement = "attention-conv", layer_scale: float | None = None,
        output_stride: Literal[8, 16, 32] = 32, spatial_dims: Literal[2, 3] = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        if output_stride not in OUTPUT_STRIDES:
            raise InputError(
                f"output_stride must be 8, 16 or 32, got {output_stride!r}: the last two stages can keep their map by "
                "dilation, those before cannot; with features_only=True out_indices chooses among the maps"
            )
        rows = {
            "depths": depths, "dims": dims, "expand_ratios": expand_ratios, "head_dims": head_dims,
            "kernel_sizes": kernel_sizes, "dilations": dilations,
        }  # fmt: skip
        check_rows(norms, attention_stages, **rows)
        if not is_count(in_channels):
            raise InputError(f"in_channels must be a positive integer, got {in_channels!r}.")
        for name, rate in (("drop_path_rate", drop_path_rate), ("drop_rate", drop_rate)):
            if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                raise InputError(f"{name} must be in [0, 1), got {rate!r}.")
        if layer_scale is not None and not is_ratio(layer_scale):
            raise InputError(f"layer_scale must be positive, at most {LARGEST_RATIO}, got {layer_scale!r}.")
        if block == "i2rmb":
            stem_dim, first_act, gate = dims[0] // 2, nn.SiLU(), nn.Identity()
        elif block == "irmb":
            stem_dim, first_act, gate = 24, nn.Identity(), SqueezeExcite(24)
        else:
            raise InputError(f"Unknown block {block!r}; choose 'i2rmb' (EMOv2) or 'irmb' (EMOv1).")
        if spatial_dims != 2 and (spatial_dims, block, output_stride) != (3, "i2rmb", 32):
            raise InputError(
                f"spatial_dims must be 2, or 3 with block 'i2rmb' and output_stride 32, got {spatial_dims!r} with "
                f"{block!r} and {output_stride!r}."
            )
        self.block, self.config = block, {}
        self.spatial_dims = spatial_dims
        if spatial_dims == 3:
            self.input_size = (4, *pair(img_size, "img_size"))
        self.stem = Stem(in_channels, stem_dim, first_act=first_act, gate=gate, spatial_dims=spatial_dims)
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        side = window_for(img_size)
        if window_size is None:
            window_size = side if spatial_dims == 2 else (2, side, side)
        window = sizes(window_size, "window_size", spatial_dims)
        options: dict[str, Any] = {"attention_mode": attention_mode, "attention_order": attention_order,
                                   "layer_scale": layer_scale}  # fmt: skip
        options = {name: value for name, value in options.items() if value not in (None, "none")}  # else the block's
        self.stages = Stages(*(
            make_stage(
                stage, dim_in, block=block, attention=stage + 1 in attention_stages and attention_mode != "none",
                norm=norms[stage], drop_paths=drop_paths[stage].tolist(), window_size=window, arrangement=arrangement,
                output_stride=output_stride, spatial_dims=spatial_dims, **options,
                **{name.rstrip("s"): row[stage] for name, row in rows.items()},
            )
            for stage, dim_in in enumerate((stem_dim, *dims[:-1]))
        ))  # fmt: skip
        self.in_chans, self.num_features, self.head_hidden_size = in_channels, dims[-1], dims[-1]  # as timm calls them
        self.feature_info = [  # timm's description of the four maps
            {"num_chs": dim, "reduction": min(4 * 2**i, output_stride), "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.norm = nn.LayerNorm(dims[-1], eps=NORM_EPS)
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes removes it, ``global_pool`` "" removes the mean over positions."""
        if num_classes != 0 and not is_count(num_classes):
            raise InputError(f"num_classes must be a positive integer, or 0 for no head, got {num_classes!r}.")
        if global_pool not in (None, "avg", ""):
            raise InputError(f"EMO pools by the mean over positions ('avg') or not at all, not by {global_pool!r}.")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Identity()
        if self.config:
            self.config |= {"num_classes": num_classes, "global_pool": self.global_pool}
        if num_classes:
            like = self.stem.proj.weight
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.train(self.training)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: the LayerScales."""
        return {name for name, _ in self.named_parameters() if name.endswith("layer_scale.gamma")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's grouping of parameters by depth, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": blocks}

    def fuse(self) -> EMO:
        """Fold batch norms and LayerScales into their neighbours, in place, for inference in eval mode."""
        fold_batch_norms(self)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training; batch-norm statistics are still updated once per step."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last stage. Shape: (B, C, H, W) -> same."""
        return channels_first(self.norm(channels_last(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map after the last stage.

        Shape: (B, in_channels, H, W) -> (B, C, H / 32, W / 32), rounded up.
        """
        x = self.stem(x)  # (B, C_stem, H / 2, W / 2)
        x = self.stages(x)  # (B, C_1, H / 4, W / 4) ... (B, C_4, H / 32, W / 32)
        return self.final_norm(x)  # (B, C_4, H / 32, W / 32)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the map and classify it.

        Shape: (B, C, H, W) -> (B, num_classes), or (B, C) with ``pre_logits``. Without pooling (B, C', H, W).
        """
        pooled = self.global_pool == "avg"
        x = x.mean(dim=(2, 3, 4)[: self.spatial_dims]) if pooled else channels_last(x)  # (B, C) or (B, H, W, C)
        if not pre_logits:
            x = kernels.linear(self.head, functional.dropout(x, self.drop_rate, self.training))
        return x if pooled else channels_first(x)  # (B, num_classes or C), or (B, C', H, W)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """The maps after chosen stages, in timm's form; ``norm`` applies the final norm to the last stage's map.

        Shape: x (B, 3, H, W) -> maps (B, C, h, w).
        """
        if output_fmt != "NCHW":
            raise InputError(f"EMO returns feature maps as NCHW, not {output_fmt!r}.")
        wanted = self.stage_indices(indices)
        stages = self.stages[: max(wanted) + 1] if stop_early else self.stages
        last, maps = len(self.feature_info) - 1, []  # `prune_intermediate_layers` may have dropped the last stages
        x = self.stem(x)  # (B, C_stem, H / 2, W / 2)
        for i, stage in enumerate(stages):
            x = run_stage(stage, x)  # (B, C_i, H', W')
            if i in wanted:
                maps.append(self.final_norm(x) if norm and i == last else x)  # (B, C_i, H', W')
        if intermediates_only:
            return maps
        return self.final_norm(x) if len(stages) - 1 == last else x, maps

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


def check_rows(norms: Sequence[str], attention_stages: Sequence[int], **rows: Sequence[float]) -> None:
    """Raise InputError naming the first row without four positive numbers, whole ones but for the expand ratios."""

    def four(values: Any) -> bool:
        return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == 4

    for name, values in rows.items():
        if name == "expand_ratios":
            if not four(values) or not all(map(is_ratio, values)):
                raise InputError(
                    f"{name} must hold four positive numbers of at most {LARGEST_RATIO}, one per stage, got {values!r}."
                )
            continue
        largest = MOST_BLOCKS if name == "depths" else LARGEST_COUNT
        if not four(values) or not all(is_count(value, largest) for value in values):
            raise InputError(
                f"{name} must hold four positive integers of at most {largest:,}, one per stage, got {values!r}."
            )
    if rows["dims"][0] < 2:
        raise InputError(f"dims must start with 2 or more, as the stem has half of that, got {rows['dims']!r}.")
    if not four(norms):
        raise InputError(f"norms must name four norms, one per stage, got {norms!r}.")
    if not isinstance(attention_stages, Sequence) or not set(attention_stages) <= {1, 2, 3, 4}:
        raise InputError(f"attention_stages must be a list of stages from 1 to 4, got {attention_stages!r}.")


def build_backbone(name: str, row: dict[str, Any] | None = None, **overrides: Any) -> EMO:
    """The classifier called ``name`` with some settings replaced; its ``config`` rebuilds it through create_model."""
    model = EMO(**{**(row or BACKBONES[name]), **overrides})
    model.config = {"name": name, **overrides, "num_classes": model.num_classes}
    return model
