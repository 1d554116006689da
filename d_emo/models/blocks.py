"""The Meta Mobile Block and its instances: IRB, iRMB and i2RMB, the adaLN form for denoisers, and DiT's block.

Sources: EMOv2 paper, section III, eq. 1-5 and fig. 4 (one residual: expand, apply an efficient operator, shrink);
section III-C3 and table XVI (D-EMO); EMOv1 paper (iRMB); DiT paper, section 3.2 (adaLN-Zero).
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.models.attention import AttentionMode, AttentionOrder, SelfAttention, WindowAttention, crop
from d_emo.models.layers import (
    NORM_EPS,
    ChannelsLastBatchNorm,
    DropPath,
    Layers,
    LayerScale,
    LinearAct,
    LocalConv,
    NormKind,
    make_norm,
)

ACTIVATIONS: dict[str, type[nn.Module]] = {"layer": nn.GELU, "batch": nn.SiLU, "none": nn.SiLU}
"""The activation of the expanded value goes with the norm before it (EMOv2, section III)."""


def is_strided(stride: int | tuple[int, ...]) -> bool:
    """Whether a stride makes a map smaller."""
    return stride != 1 and stride != (1,) * len(stride if isinstance(stride, tuple) else ())


@kernels.known
class MobileOperator(nn.Module):
    """The inside of a Meta Mobile Block's residual: expand C -> M, attention and / or local convolution, shrink.

        v = act(Wv u), a = SEW-MHSA(q, k, v)         eq. 2-4; without attention a = v
        y = a + SiLU(BN(DWConv(a)))                  eq. 5; inner skip only where the block has its residual
        out = Wo y

    Args:
        dim: input channels C.
        out_dim: output channels; ``dim`` unless given.
        expand_ratio: M / C.
        attention: switch of the window attention; off gives the expansion ``act(W u)`` alone.
        local_conv: switch of the depthwise convolution.
        num_heads, window_size, attention_mode, attention_order: see `WindowAttention`; unused without attention.
        kernel_size, stride, dilation, local_norm, local_act: see `LocalConv`; unused without local convolution.
        spatial_dims: axes of the map, 2 for images and 3 for videos; window, kernel and stride may be one for each.
        inner_skip: add the input of the depthwise convolution to its output.
        act: activation class of the expansion.

    Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), out_dim); with three axes (B, T, H, W, C) likewise.

    Raises:
        InputError: Channels or ratios that no operator has; down-sampling with an inner skip.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        expand_ratio: float = 4.0,
        attention: bool = True,
        local_conv: bool = True,
        num_heads: int = 1,
        window_size: int | tuple[int, ...] = 7,
        attention_mode: AttentionMode = "spanning",
        attention_order: AttentionOrder = "post",
        kernel_size: int | tuple[int, ...] = 5,
        stride: int | tuple[int, ...] = 1,
        dilation: int = 1,
        local_norm: NormKind = "batch",
        local_act: type[nn.Module] = nn.SiLU,
        spatial_dims: int = 2,
        inner_skip: bool = True,
        act: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        mid_dim = int(dim * expand_ratio)
        if mid_dim < 1:
            raise InputError(f"expand_ratio must be positive and leave at least one channel, got {expand_ratio!r}.")
        if is_strided(stride) and (inner_skip or not local_conv):
            raise InputError("Down-sampling is the depthwise convolution's work and admits no inner skip.")
        if attention:
            self.expand = WindowAttention(
                dim, mid_dim, num_heads=num_heads, window_size=window_size, mode=attention_mode, order=attention_order,
                act=act, spatial_dims=spatial_dims,
            )  # fmt: skip
        else:
            self.expand = LinearAct(dim, mid_dim, act())
        self.mid_dim, self.inner_skip = mid_dim, inner_skip
        self.local = (
            LocalConv(
                mid_dim, kernel_size=kernel_size, stride=stride, dilation=dilation, norm=local_norm, act=local_act,
                spatial_dims=spatial_dims,
            )
            if local_conv
            else None
        )  # fmt: skip
        self.proj = nn.Linear(mid_dim, out_dim or dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        a = self.expand(u)  # (B, H, W, M)  eq. 2-4
        if self.local is None:
            return kernels.linear(self.proj, a)  # (B, H, W, C_out)
        return kernels.local_branch(self.local, self.proj, a, skip=self.inner_skip)  # (B, H', W', C_out)  eq. 5


class ReorderedOperator(MobileOperator):
    """A `MobileOperator` whose attention and convolution meet in another way, for ablations; the weights are the same.

    Both parts are needed, and the value has to be expanded before it is mixed (the post order).

    Shape: (B, H, W, C) -> (B, H, W, out_dim).

    Raises:
        InputError: There is nothing to reorder.
    """

    def __init__(self, dim: int, out_dim: int | None = None, **options: Any) -> None:
        super().__init__(dim, out_dim, **options)
        if self.local is None or not self.inner_skip or getattr(self.expand, "order", None) != "post":
            raise InputError(
                "arrangement 'conv-attention' and 'parallel' need attention with attention_order 'post', the local "
                "convolution and its skip; use 'attention-conv'."
            )


@kernels.known
class ConvFirstOperator(ReorderedOperator):
    """F = Attention(DWConv(.)): the convolution refines the value before the map mixes it."""

    def forward(self, u: Tensor) -> Tensor:
        return kernels.linear(self.proj, self.expand(u, lambda value: value + self.local(value)))  # (B, H, W, C_out)


@kernels.known
class ParallelOperator(ReorderedOperator):
    """F = Attention(.) + DWConv(.), side by side on the same value."""

    def forward(self, u: Tensor) -> Tensor:
        values: list[Tensor] = []
        mixed = self.expand(u, lambda value: values.append(value) or value)  # (B, H, W, M)
        beside = crop(self.local(values[0]), u)  # (B, H, W, M), of the padded map
        return kernels.linear(self.proj, mixed + beside)  # (B, H, W, C_out)


Arrangement = Literal["attention-conv", "conv-attention", "parallel"]
ARRANGEMENTS: dict[str, type[MobileOperator]] = {
    "attention-conv": MobileOperator, "conv-attention": ConvFirstOperator, "parallel": ParallelOperator,
}  # fmt: skip
"""How attention and convolution meet; the papers' operator is the first, a cascade."""


class MetaMobileBlock(nn.Module):
    """One residual block of the classifiers: ``x + DropPath(LayerScale(F(Norm(x))))``.

    Args:
        dim: input channels.
        out_dim: output channels; ``dim`` unless given.
        norm: norm before the operator; decides the activation too.
        stride: 1 keeps the map. 2, or (1, 2, 2) of a video, makes a down-sampling block: the expand ratio is doubled,
            attention, inner skip and residual are off; LayerScale stays.
        down: Whether it is a down-sampling block. Default: where it has a stride; one that has none keeps the map, in
            dilated networks.
        layer_scale: start value of LayerScale, or None for no LayerScale (EMOv1).
        drop_path: probability of dropping the residual branch of an image in training.
        arrangement: a key of `ARRANGEMENTS`; blocks without attention have nothing to arrange.
        expand_ratio, attention, spatial_dims, options: see `MobileOperator`.

    Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), out_dim).

    Raises:
        InputError: An unknown arrangement.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        norm: NormKind = "layer",
        stride: int | tuple[int, ...] = 1,
        spatial_dims: int = 2,
        down: bool | None = None,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        expand_ratio: float = 4.0,
        attention: bool = True,
        arrangement: Arrangement = "attention-conv",
        **options: Any,
    ) -> None:
        super().__init__()
        if arrangement not in ARRANGEMENTS:
            known = ", ".join(map(repr, ARRANGEMENTS))
            raise InputError(f"Unknown arrangement {arrangement!r}; choose one of {known}.")
        out_dim = out_dim or dim
        down = is_strided(stride) if down is None else down
        self.residual = not down and out_dim == dim
        self.norm = make_norm(norm, dim, spatial_dims)
        attention = attention and not down
        if is_strided(stride):
            options["dilation"] = 1
        self.operator = ARRANGEMENTS[arrangement if attention else "attention-conv"](
            dim, out_dim, expand_ratio=expand_ratio * 2 if down else expand_ratio, attention=attention, stride=stride,
            inner_skip=self.residual, act=ACTIVATIONS[norm], spatial_dims=spatial_dims, **options,
        )  # fmt: skip
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(out_dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_scale(self.operator(self.norm(x)))  # (B, H', W', C_out)
        if not self.residual:
            return y
        operator, scale, drop_path = self.operator, self.layer_scale, self.drop_path
        return kernels.add(drop_path(y), x, operator, operator.proj, scale, drop_path)

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Absorb a batch norm into the expansion after it, and LayerScale into the projection before it.

        Either only where nothing is wrapped around the two or hung on them.
        """
        operator, expand, proj = self.operator, self.operator.expand, self.operator.proj
        # Attention pads with zeros between norm and expansion, so a norm before attention has to stay.
        norm, linear = self.norm, expand[0] if isinstance(expand, nn.Sequential) else None
        if isinstance(norm, ChannelsLastBatchNorm) and linear and not kernels.opaque(norm, norm.bn, operator, linear):
            factor, offset = norm.affine()
            linear.bias.add_(linear.weight @ offset)
            linear.weight.mul_(factor)
            self.norm = nn.Identity()
        if isinstance(self.layer_scale, LayerScale) and not kernels.opaque(self.layer_scale, operator, proj):
            proj.weight.mul_(self.layer_scale.gamma[:, None])
            self.layer_scale = nn.Identity()


MOBILE_BLOCKS: dict[str, dict[str, Any]] = {
    "irb": {"attention": False, "layer_scale": None},
    "irmb": {"attention_mode": "far", "attention_order": "pre", "layer_scale": None},
    "i2rmb": {"attention_mode": "spanning", "attention_order": "post", "layer_scale": 1e-6},
}
"""The named instances of the Meta Mobile Block. A row is what distinguishes one; everything else is shared."""


BlockKind = Literal["irb", "irmb", "i2rmb"]


def mobile_block(kind: BlockKind, dim: int, out_dim: int | None = None, **options: Any) -> MetaMobileBlock:
    """A `MetaMobileBlock` with the settings of one row of `MOBILE_BLOCKS`; ``options`` override the row.

    Raises:
        InputError: There is no such row.
    """
    if kind not in MOBILE_BLOCKS:
        raise InputError(f"Unknown block {kind!r}; choose one of {', '.join(map(repr, MOBILE_BLOCKS))}.")
    return MetaMobileBlock(dim, out_dim, **{**MOBILE_BLOCKS[kind], **options})


def adaln_projection(dim: int, chunks: int, condition_dim: int | None = None) -> nn.Sequential:
    """SiLU and one linear layer from the condition to ``chunks`` vectors of ``dim`` channels.

    Shape: (B, condition_dim or dim) -> (B, chunks * dim).
    """
    return Layers(nn.SiLU(), nn.Linear(condition_dim or dim, chunks * dim))


def gated_residual(x: Tensor, chunks: Tensor, norm: nn.Module, operator: Callable[[Tensor], Tensor]) -> Tensor:
    """The adaLN-Zero residual, with shift, scale and gate side by side in ``chunks``.

    Shape: x (B, H, W, C), chunks (B, 3C) -> (B, H, W, C).
    """
    shift, scale, gate = chunks.chunk(3, dim=-1)  # 3 x (B, C)
    return x + gate[:, None, None] * operator(kernels.modulated_norm(norm, x, shift, scale))


class AdaLNMobileBlock(nn.Module):
    """i2RMB conditioned by adaLN-Zero: ``x + gate * F(LN(x) * (1 + scale) + shift)``.

    One residual, so three chunks where DiT has six; the zero gate replaces LayerScale (EMOv2 paper, III-C3).

    Args:
        dim: channels of the tokens.
        condition_dim: channels D of the condition; ``dim`` unless given.
        options: see `MobileOperator`.

    Shape: x (B, H, W, C), c (B, D) -> (B, H, W, C).
    """

    def __init__(self, dim: int, *, condition_dim: int | None = None, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.operator = MobileOperator(dim, **options)
        self.adaLN_modulation = adaln_projection(dim, 3, condition_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return gated_residual(x, self.adaLN_modulation(c), self.norm, self.operator)  # (B, H, W, C)


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between.

    Shape: (..., C) -> (..., C).
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(self.fc2, kernels.linear(self.fc1, x, self.act))


class DiTBlock(nn.Module):
    """DiT's transformer block with adaLN-Zero (DiT paper, fig. 3): attention and MLP, two residuals, six chunks.

    Shape: x (B, H, W, C), c (B, D) -> (B, H, W, C); D is C unless ``condition_dim`` says otherwise.
    """

    def __init__(
        self, dim: int, *, num_heads: int, expand_ratio: float = 4.0, condition_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.attn = SelfAttention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * expand_ratio))
        self.adaLN_modulation = adaln_projection(dim, 6, condition_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        attention, mlp = self.adaLN_modulation(c).chunk(2, dim=-1)  # 2 x (B, 3C)
        x = gated_residual(x, attention, self.norm1, self.attn)  # (B, H, W, C)
        return gated_residual(x, mlp, self.norm2, self.mlp)  # (B, H, W, C)
