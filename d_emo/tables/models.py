"""Blocks of a denoiser, and the families of named denoisers that are made of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """A block that a denoiser can be made of.

    Attributes:
        name: The value of ``Denoiser``'s argument ``block``.
        module: Called with ``hidden_size``, and by keyword ``num_heads``, ``expand_ratio`` and the ``options``; gives a
            module of forward(x, c), x (B, H, W, C) and c (B, C) -> (B, H, W, C). Its ``adaLN_modulation[1].weight``, if
            it has one, starts at zero. Hierarchical denoisers add ``condition_dim``, the channels of c.
        options: Arguments of ``Denoiser`` that it takes beyond these: of attention_mode, window_size, kernel_size and
            local_norm. All others are refused for it.
        affine_final_norm: Whether the norm of the final layer has a weight and a bias.
    """

    name: str
    module: Reference
    options: tuple[str, ...] = ()
    affine_final_norm: bool = True


@dataclass(frozen=True, kw_only=True)
class FrameRow:
    """A class of denoisers: what stands around the blocks, and how they are connected.

    Attributes:
        name: The class's name; the ``config.json`` of a snapshot names it.
        denoiser: A subclass of ``d_emo.models.contract.DenoiserFrame``.
    """

    name: str
    denoiser: Reference


SIZES: dict[str, dict[str, int]] = {
    "Ti": {"depth": 12, "hidden_size": 192, "num_heads": 3},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads as in DiT; the tiny size is ours."""

LEVELS: dict[str, dict[str, Any]] = {
    "Ti": {"widths": (96, 192, 288), "depths": (4, 2, 2), "condition_size": 192, "head_size": 32},
    "S": {"widths": (192, 384, 576), "depths": (4, 2, 2), "condition_size": 384},
    "B": {"widths": (384, 768, 1152), "depths": (4, 2, 2), "condition_size": 768},
}
"""Hierarchical denoisers with the parameters of the flat ones of the same name, within 1 %; all ours."""

PATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """Named denoisers: NAME-SIZE-PATCH, for every size and patch.

    Attributes:
        name: First part of the names.
        block: A name of `BLOCKS`.
        objective: What it is trained with unless a run says otherwise.
        frame: A name of `FRAMES`.
        sizes: Arguments of the frame, by the name of the size.
        patch_sizes: Sides of a token's patch.
        papers: Keys of the papers that a model card cites.
    """

    name: str
    block: str
    objective: str = "eps"
    frame: str = "Denoiser"
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SIZES)
    patch_sizes: tuple[int, ...] = PATCH_SIZES
    papers: tuple[str, ...] = ("DiT",)


BLOCKS: Table[BlockRow] = Table(
    "block",
    [
        BlockRow(
            name="i2rmb", module="d_emo.models.blocks:AdaLNMobileBlock",
            options=("attention_mode", "window_size", "kernel_size", "local_norm"),
        ),
        BlockRow(name="dit", module="d_emo.models.blocks:DiTBlock", affine_final_norm=False),
    ],
)  # fmt: skip

FRAMES: Table[FrameRow] = Table(
    "denoiser",
    [
        FrameRow(name="Denoiser", denoiser="d_emo.models.denoiser:Denoiser"),
        FrameRow(name="HierarchicalDenoiser", denoiser="d_emo.models.hierarchical:HierarchicalDenoiser"),
    ],
)

FAMILIES: Table[FamilyRow] = Table(
    "family of denoisers",
    [
        FamilyRow(name="D-EMOv2", block="i2rmb", papers=("EMOv2", "DiT")),
        FamilyRow(name="U-D-EMOv2", block="i2rmb", objective="flow", frame="HierarchicalDenoiser", sizes=LEVELS),
        FamilyRow(name="DiT", block="dit"),
        FamilyRow(name="SiT", block="dit", objective="flow"),
    ],
)


def denoisers() -> dict[str, dict[str, Any]]:
    """Every named denoiser, as the arguments of its frame that make it."""
    return {
        f"{name}-{size}-{patch}": {**arguments, "patch_size": patch, "block": family.block}
        for name, family in FAMILIES.items()
        for size, arguments in family.sizes.items()
        for patch in family.patch_sizes
    }


def family_of(model: str) -> FamilyRow | None:
    """The family of a denoiser's name, such as "D-EMOv2-S-2" or "sit-xl/2"; None for other names."""
    wanted = model.replace("/", "-").lower()
    return next((FAMILIES[known.rsplit("-", 2)[0]] for known in denoisers() if known.lower() == wanted), None)
