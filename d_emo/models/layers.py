"""Small parts shared by denoisers and classifiers: norms, modulation, LayerScale, local convolution.

They are those of the DiT and EMOv2 papers. Feature maps are channels-last, ``(B, H, W, C)``, everywhere in
``d_emo.models`` except at the two ends of a network.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.kernels.partitions import channels_first, channels_last

NORM_EPS = 1e-6
"""Every norm of EMOv1, EMOv2, D-EMO and DiT uses this epsilon."""

NormKind = Literal["batch", "layer", "none"]


LARGEST_COUNT, LARGEST_RATIO, MOST_BLOCKS = 1_000_000, 1000, 1000
"""Above these no size, expand ratio or depth of a network is meant, and building it would not end."""


def is_count(value: object, largest: int = LARGEST_COUNT) -> bool:
    """Whether a value is a positive integer, and not beyond all measure."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest


def is_ratio(value: object) -> bool:
    """Whether a value is a positive number, and not beyond all measure."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LARGEST_RATIO


AXES = {1: "(length,)", 2: "(height, width) pair", 3: "(frames, height, width) triple"}


def sizes(value: int | Sequence[int], name: str, spatial_dims: int) -> tuple[int, ...]:
    """A size along each axis of a map, given as one integer or as that many; InputError unless all are positive."""
    found = (value,) * spatial_dims if isinstance(value, int) else value
    found = tuple(found) if isinstance(found, (tuple, list)) else ()
    if len(found) != spatial_dims or not all(map(is_count, found)):
        raise InputError(f"{name} must be a positive integer or a {AXES[spatial_dims]} of them, got {value!r}.")
    return found


def pair(value: int | tuple[int, int] | list[int], name: str) -> tuple[int, int]:
    """`sizes` of an image or a feature map: (height, width)."""
    return sizes(value, name, 2)


class LinearAct(nn.Sequential):
    """A linear layer and an activation.

    Shape: (..., C) -> (..., D).
    """

    def __init__(self, dim: int, out_dim: int, act: nn.Module) -> None:
        super().__init__(nn.Linear(dim, out_dim), act)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(self[0], x, self[1])


class Layers(nn.Sequential):
    """One layer after the other, linear ones by `d_emo.kernels.linear`.

    Shape: (..., C) -> (..., D).
    """

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = kernels.linear(layer, x) if isinstance(layer, nn.Linear) else layer(x)
        return x


LIBRARY: dict[int, tuple[type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d),
}  # fmt: skip
"""PyTorch's convolution and batch norm for maps of so many axes."""


@kernels.known
class ChannelsLastBatchNorm(nn.Module):
    """BatchNorm over the last axis.

    The plain ``BatchNorm2d`` is a child, not the base class, so that `synchronise_batch_norms` can exchange it.

    Shape: (B, H, W, C) -> (B, H, W, C); with three ``spatial_dims`` (B, T, H, W, C).
    """

    def __init__(self, dim: int, spatial_dims: int = 2) -> None:
        super().__init__()
        self.bn = LIBRARY[spatial_dims][1](dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.bn(channels_first(x)))  # views

    def affine(self) -> tuple[Tensor, Tensor]:
        """What the norm does in eval mode: ``x * factor + offset``. Shape: -> 2 x (C,)."""
        factor = self.bn.weight * torch.rsqrt(self.bn.running_var + self.bn.eps)
        return factor, self.bn.bias - self.bn.running_mean * factor


def make_norm(kind: NormKind, dim: int, spatial_dims: int = 2) -> nn.Module:
    """The norm called ``kind`` for channels-last maps of ``dim`` channels; else InputError."""
    if kind not in ("batch", "layer", "none"):
        raise InputError(f"Unknown norm {kind!r}; choose 'batch', 'layer' or 'none'.")
    if kind == "layer":
        return nn.LayerNorm(dim, eps=NORM_EPS)
    return ChannelsLastBatchNorm(dim, spatial_dims) if kind == "batch" else nn.Identity()


@kernels.known
class LayerScale(nn.Module):
    """One learned factor per channel, close to zero at the start (CaiT, eq. 4).

    Shape: (..., C) -> (..., C).
    """

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@kernels.known
class DropPath(nn.Module):
    """In training, leave a residual branch out of a share of the images (Huang et al., 2016, eq. 2).

    The draws are those of timm's, whose import takes a second. What is kept is scaled, so that the mean stays.

    Shape: (B, ...) -> (B, ...).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)  # (B, 1, ...)
        return x * (kept / keep if keep else kept)


@kernels.known
class LocalConv(nn.Module):
    """Depthwise k x k convolution without bias, then norm, then activation.

    Args:
        dim: channels.
        kernel_size: odd side length of the kernel, or one along each axis.
        stride: 1, or 2 to halve the map (rounding up), or one along each axis.
        dilation: distance between the taps of the kernel.
        norm: norm after the convolution; the papers' classifiers use batch norm.
        act: activation class; the papers' classifiers use SiLU.
        spatial_dims: axes of the map, 2 for images and 3 for videos.

    Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C); with three axes (B, T, H, W, C) likewise.

    Raises:
        InputError: A kernel without a centre, or a dilation below 1.
    """

    def __init__(
        self, dim: int, *, kernel_size: int | tuple[int, ...], stride: int | tuple[int, ...] = 1, dilation: int = 1,
        norm: NormKind = "batch", act: type[nn.Module] = nn.SiLU, spatial_dims: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel = sizes(kernel_size, "kernel_size", spatial_dims)
        if not all(size % 2 for size in kernel):
            raise InputError(f"kernel_size must be odd and positive, so that it has a centre, got {kernel_size!r}.")
        if not isinstance(dilation, int) or dilation < 1:
            raise InputError(f"dilation must be a positive integer, got {dilation!r}.")
        padding = tuple(dilation * (size // 2) for size in kernel)
        self.conv = LIBRARY[spatial_dims][0](dim, dim, kernel, stride, padding, dilation, groups=dim, bias=False)
        self.norm = make_norm(norm, dim, spatial_dims)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return kernels.local_conv(self.conv, self.norm, self.act, x)  # (B, H', W', C)

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Absorb the batch norm's running statistics into the convolution, if it has one and nothing hangs on them."""
        if not isinstance(self.norm, ChannelsLastBatchNorm) or kernels.opaque(self.conv, self.norm, self.norm.bn):
            return
        conv, (weight, bias) = self.conv, kernels.folded(self.conv, self.norm)
        folded = type(conv)(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            groups=conv.groups, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        folded.weight.copy_(weight)
        folded.bias.copy_(bias)
        self.conv, self.norm = folded, nn.Identity()


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Fold batch norms into the convolutions and linear layers beside them, in place, for inference.

    In eval mode a batch norm is an affine map, so the output is unchanged up to rounding. The model can no longer be
    trained or saved as before: fold a copy, or fold last. Beside a layer that is wrapped, or has hooks, it stays.

    Raises:
        InputError: if the model is in training mode, where batch norm is not an affine map.
    """
    if model.training:
        raise InputError("fold_batch_norms needs a model in eval mode; call model.eval() first.")
    for module in list(model.modules()):
        if hasattr(module, "fold_norm"):
            module.fold_norm()
    return model.eval()


class _Synced(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose batch is that of all processes together, on any device; equal shares are assumed.

    PyTorch's own ``SyncBatchNorm`` runs on GPUs only. Statistics are computed in float32: the mean first, then the
    squared distances from it, each summed over the processes by a differentiable all-reduce. In eval mode without
    running statistics every process has its own batch's.

    Shape: (B, C, *) -> (B, C, *).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return super().forward(x)
        count = x.numel() // x.shape[1] * distributed.get_world_size()
        others, column = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
        mean = all_reduce(x.float().sum(others)) / count  # (C,)
        centred = x.float() - mean.view(column)  # (B, C, H, W)
        variance = all_reduce(centred.square().sum(others)) / count  # (C,)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_(variance.to(self.running_var) * (count / max(1, count - 1)), share)
        factor = torch.rsqrt(variance + self.eps)  # (C,)
        if not self.affine:
            return (centred * factor.view(column)).to(x.dtype)
        return (centred * (self.weight * factor).view(column) + self.bias.view(column)).to(x.dtype)


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """`nn.BatchNorm1d` over the batches of all processes. Shape: (B, C), (B, C, L) -> the same."""


@kernels.known
class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes. Shape: (B, C, H, W) -> (B, C, H, W)."""


@kernels.known
class SyncedBatchNorm3d(_Synced, nn.BatchNorm3d):
    """`nn.BatchNorm3d` over the batches of all processes. Shape: (B, C, T, H, W) -> (B, C, T, H, W)."""


class SyncedBatchNormAct2d(SyncedBatchNorm2d):
    """timm's batch norm that ends with dropout and an activation of its own. Shape: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


SYNCED = {nn.BatchNorm1d: SyncedBatchNorm1d, nn.BatchNorm2d: SyncedBatchNorm2d, nn.BatchNorm3d: SyncedBatchNorm3d}


def synchronise_batch_norms(model: nn.Module) -> None:
    """Make every batch norm of a model use the batch of all processes; parameters, buffers and names stay.

    Raises:
        InputError: A batch norm of another class, whose own work would be lost.
    """
    for path, parent in list(model.named_modules()):
        for name, norm in parent.named_children():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, _Synced):
                kind = _synced_kind(norm, f"{path}.{name}".lstrip("."))
                synced = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
                synced._parameters, synced._buffers, synced._modules = norm._parameters, norm._buffers, norm._modules
                setattr(parent, name, synced.train(norm.training))


def _synced_kind(norm: nn.Module, name: str) -> type[_Synced]:
    """By the exact class: one that is made of another's does more than that."""
    if type(norm) in SYNCED:
        return SYNCED[type(norm)]
    from timm.layers import BatchNormAct2d  # half a second, which networks of ours do not need

    if type(norm) is BatchNormAct2d:
        return SyncedBatchNormAct2d
    known = ", ".join(kind.__name__ for kind in (*SYNCED, BatchNormAct2d))
    found = f"{name} is of class {type(norm).__name__}"
    raise InputError(f"`sync_batchnorm` knows batch norms of the classes {known}, and {found}; leave it off")


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """All batch norms of a model."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def norm_buffers(model: nn.Module) -> list[Tensor]:
    """The running statistics of all batch norms, which every forward pass in training mode changes.

    Shape: -> (C,) each.
    """
    return [buffer for norm in batch_norms(model) for buffer in norm.buffers()]


@contextlib.contextmanager
def scratch_statistics(module: nn.Module) -> Iterator[None]:
    """Within this context batch norms read and update copies of their running statistics; the originals stay as is."""
    norms = batch_norms(module)
    originals = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, originals, strict=True):
            norm._buffers.update(buffers)


def checkpoint_block(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a block under gradient checkpointing.

    The block runs a second time in the backward pass. Plain checkpointing would let that second run update the running
    statistics of batch norm again; here it does not.

    Shape: as the block's.
    """
    return checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), scratch_statistics(block))
    )
