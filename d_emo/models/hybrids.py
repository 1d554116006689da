"""iRMB and i2RMB in the place of the two residuals of DeiT-Tiny's and PVT-Tiny's blocks, known to timm.

Sources: EMOv2 paper, table IV; EMOv1 paper, table 3; DeiT (arXiv:2012.12877); PVT (arXiv:2102.12122). None of the four
was released. That parameters and MACs are the printed ones says which layers there are and which maps they see, with
three exceptions, which are our choice: DeiT's class token passes by the depthwise convolution; its i2RMB sums near and
far attention, whose one window is the whole image; PVT's i2RMB, whose keys are spatially reduced, attends once.
"""

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.models.attention import WindowAttention
from d_emo.models.blocks import MOBILE_BLOCKS
from d_emo.models.layers import NORM_EPS, LocalConv

KERNELS = {"irmb": 3, "i2rmb": 5}


class TokenBlock(nn.Module):
    """A Meta Mobile Block of tokens: attention of all, depthwise convolution of those that lie on the image.

    In the last block nothing comes of that convolution where the class token alone is classified.

    Args:
        dim: channels C.
        num_heads: heads.
        mlp_ratio: what the block expands its channels by.
        drop_path: probability of dropping the residual branch of an image in training.
        kind: "irmb" or "i2rmb".
        grid: rows and columns of tokens; one class token stands before them.
        _: what else timm's frame gives its own blocks.

    Shape: (B, 1 + H W, C) -> same.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float = 0.0, *, kind: str, grid: tuple[int, int],
        **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        mid_dim, self.grid = int(dim * mlp_ratio), grid
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.expand = WindowAttention(
            dim, mid_dim, num_heads=num_heads, window_size=1 + grid[0] * grid[1], order="pre", spatial_dims=1,
            mode=MOBILE_BLOCKS[kind]["attention_mode"],
        )  # fmt: skip
        self.local = LocalConv(mid_dim, kernel_size=KERNELS[kind])
        self.proj = nn.Linear(mid_dim, dim, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        a = self.expand(self.norm(x))  # (B, 1 + H W, M)
        local = self.local(a[:, 1:].unflatten(1, self.grid)).flatten(1, 2)  # (B, H W, M)
        y = a + F.pad(local, (0, 0, 1, 0))
        return x + self.drop_path(kernels.linear(self.proj, y))


class ReducedBlock(nn.Module):
    """A Meta Mobile Block of a map whose keys are those of a smaller one, as PVT's attention (eq. 2 there).

    Args:
        dim: channels C.
        num_heads: heads.
        ratio: what the block expands its channels by.
        reduction: what each side of the keys' map is divided by.
        drop_path: probability of dropping the residual branch of an image in training.
        kind: "irmb" or "i2rmb".

    Shape: (B, H W, C), and a class token before them if there is one -> same.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int, reduction: int, drop_path: float, *, kind: str) -> None:
        super().__init__()
        self.num_heads, self.norm = num_heads, nn.LayerNorm(dim, eps=NORM_EPS)
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, ratio * dim)
        self.reduce = self.reduced_norm = None
        if reduction > 1:
            self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
            self.reduced_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.act = nn.GELU()
        self.local = LocalConv(ratio * dim, kernel_size=KERNELS[kind])
        self.proj = nn.Linear(ratio * dim, dim, bias=False)
        self.drop_path = DropPath(drop_path)

    def heads(self, x: Tensor) -> Tensor:
        """Shape: (B, N, C) -> (B, heads, N, C / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        u = seen = self.norm(x)  # (B, N, C)
        if self.reduce is not None:
            seen = self.reduce(u.unflatten(1, grid).movedim(-1, 1)).flatten(2).mT  # (B, N / reduction^2, C)
            seen = self.reduced_norm(seen)
        q, k = self.heads(kernels.linear(self.q, u)), self.heads(kernels.linear(self.k, seen))
        mixed = F.scaled_dot_product_attention(q, k, self.heads(seen)).transpose(1, 2).flatten(2)  # (B, N, C)
        a = kernels.linear(self.v, mixed, self.act)  # (B, N, M)
        tokens = a.shape[1] - grid[0] * grid[1]  # none, or the class token
        local = self.local(a[:, tokens:].unflatten(1, grid)).flatten(1, 2)
        return x + self.drop_path(kernels.linear(self.proj, a + F.pad(local, (0, 0, tokens, 0))))


class PVT(nn.Module):
    """The frame of PVT-Tiny: four stages of strides 4 to 32 with learned positions, a class token in the last.

    Args:
        kind: "irmb" or "i2rmb".
        dims, heads, ratios, reductions, depths: one entry per stage.
        num_classes: outputs of the head; 0 leaves it out.
        in_chans: channels of the image.
        img_size: pixels of the image, a multiple of 32; other sizes have their positions interpolated.
        drop_rate: dropout after the positions are added.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.

    Shape: (B, in_chans, H, W) -> (B, num_classes), sides multiples of 32.

    Raises:
        InputError: The size of the image is no multiple of 32.
    """

    def __init__(
        self, kind: str, dims: tuple[int, ...] = (64, 128, 320, 512), heads: tuple[int, ...] = (1, 2, 5, 8),
        ratios: tuple[int, ...] = (8, 8, 4, 4), reductions: tuple[int, ...] = (8, 4, 2, 1),
        depths: tuple[int, ...] = (2, 2, 2, 2), num_classes: int = 1000, in_chans: int = 3, img_size: int = 224,
        drop_rate: float = 0.0, drop_path_rate: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        side = img_size if isinstance(img_size, int) else img_size[0]
        if side < 32 or side % 32:
            raise InputError(f"img_size must be a multiple of 32, PVT's largest stride, got {img_size!r}.")
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, dims[-1], dims[-1]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.side, self.feature_info = side // 4, []
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        self.embed, self.embed_norm, self.stages, self.pos_embed = (
            nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), nn.ParameterList(),
        )  # fmt: skip
        for i, dim in enumerate(dims):
            patch = 2 if i else 4
            self.embed.append(nn.Conv2d(dims[i - 1] if i else in_chans, dim, patch, patch))
            self.embed_norm.append(nn.LayerNorm(dim))
            self.pos_embed.append(nn.Parameter(torch.zeros(1, (self.side >> i) ** 2 + (i == len(dims) - 1), dim)))
            self.stages.append(nn.ModuleList(
                ReducedBlock(dim, heads[i], ratios[i], reductions[i], rates.pop(0), kind=kind) for _ in range(depths[i])
            ))  # fmt: skip
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.pos_drop, self.norm = nn.Dropout(drop_rate), nn.LayerNorm(dims[-1], eps=NORM_EPS)
        for parameter in (self.cls_token, *self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes removes it."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: class token and positions."""
        return {"cls_token", *(f"pos_embed.{i}" for i in range(len(self.pos_embed)))}

    def positions(self, stage: int, grid: tuple[int, int]) -> Tensor:
        """The learned positions of a stage for a map of any size. Shape: -> (1, N, C)."""
        table, side = self.pos_embed[stage], self.side >> stage
        if grid == (side, side):
            return table
        prefix = table.shape[1] - side**2
        places = F.interpolate(table[:, prefix:].mT.unflatten(2, (side, side)), grid, mode="bilinear").flatten(2).mT
        return torch.cat([table[:, :prefix], places], dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised tokens of the last stage, the class token first. Shape: (B, C_in, H, W) -> (B, 1 + N, C)."""
        last = len(self.stages) - 1
        for i, (embed, norm, blocks) in enumerate(zip(self.embed, self.embed_norm, self.stages, strict=True)):
            x = embed(x)  # (B, C_i, H_i, W_i)
            grid = x.shape[2], x.shape[3]
            x = norm(x.flatten(2).mT)  # (B, N, C_i)
            if i == last:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = self.pos_drop(x + self.positions(i, grid))
            for block in blocks:
                x = block(x, grid)
            if i != last:
                x = x.mT.unflatten(2, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Classify the class token. Shape: (B, 1 + N, C) -> (B, num_classes), or (B, C) with ``pre_logits``."""
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def deit_tiny(kind: str, img_size: int | tuple[int, int] = 224, **settings: Any) -> VisionTransformer:
    """DeiT-Tiny in timm's frame with our blocks; ``settings`` are those of timm's `VisionTransformer`."""
    rows, columns = (img_size, img_size) if isinstance(img_size, int) else img_size
    settings = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **settings}
    patch = settings["patch_size"]
    block = partial(TokenBlock, kind=kind, grid=(rows // patch, columns // patch))
    model = VisionTransformer(img_size=(rows, columns), block_fn=block, **settings)
    model.in_chans = settings.get("in_chans", 3)
    return model


HYBRIDS: dict[str, Callable[..., nn.Module]] = {
    f"{frame}_{kind}": partial(make, kind) for frame, make in (("deit_tiny", deit_tiny), ("pvt_tiny", PVT))
    for kind in KERNELS
}  # fmt: skip


def hybrid_settings(name: str) -> list[str]:
    """What can be set of one of `HYBRIDS`: for DeiT's also what timm's `VisionTransformer` takes beside its frame."""
    own = list(inspect.signature(HYBRIDS[name]).parameters)
    if "settings" not in own:
        return own
    given = {"self", "block_fn", *own}
    return [*own[:-1], *(key for key in inspect.signature(VisionTransformer.__init__).parameters if key not in given)]


default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "crop_pct": 0.9,
            "interpolation": "bicubic", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.proj" if "deit" in name else "embed.0", "classifier": "head",
        }  # fmt: skip
        for name in HYBRIDS
    }
)


def register_hybrids() -> None:
    """Add the four names to timm's registry, unless they are there."""
    for name, make in HYBRIDS.items():
        def create(pretrained: bool = False, *, _name: str = name, _make: Any = make, **kwargs: Any) -> nn.Module:
            return build_model_with_cfg(_make, _name, pretrained, **kwargs)

        create.__name__, create.__module__, create.__doc__ = name, __name__, f"{name}, built by d_emo."
        if not is_model(name):
            setattr(sys.modules[__name__], name, register_model(create))


register_hybrids()
