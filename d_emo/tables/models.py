"""Blocks of a denoiser, and the families of named denoisers that are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from d_emo.tables.table import Reference, Table


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """A block that a denoiser can be made of.

    Attributes:
        name: The value of ``Denoiser``'s argument ``block``.
        module: Called with ``hidden_size``, and by keyword ``num_heads``, ``expand_ratio`` and the ``options``; gives a
            module of forward(x, c), x (B, H, W, C) and c (B, C) -> (B, H, W, C). Its ``adaLN_modulation[1].weight``, if
            it has one, starts at zero.
        options: Arguments of ``Denoiser`` that it takes beyond these: of attention_mode, window_size, kernel_size and
            local_norm. All others are refused for it.
        affine_final_norm: Whether the norm of the final layer has a weight and a bias.
    """

    name: str
    module: Reference
    options: tuple[str, ...] = ()
    affine_final_norm: bool = True


@dataclass(frozen=True, kw_only=True)
class FamilyRow:
    """Named denoisers: NAME-SIZE-PATCH, for every size and patch.

    Attributes:
        name: First part of the names.
        block: A name of `BLOCKS`.
        objective: What it is trained with unless a run says otherwise.
    """

    name: str
    block: str
    objective: str = "eps"


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

FAMILIES: Table[FamilyRow] = Table(
    "family of denoisers",
    [
        FamilyRow(name="D-EMOv2", block="i2rmb"),
        FamilyRow(name="DiT", block="dit"),
        FamilyRow(name="SiT", block="dit", objective="flow"),
    ],
)

SIZES: dict[str, dict[str, int]] = {
    "Ti": {"depth": 12, "hidden_size": 192, "num_heads": 3},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
"""Depth, width and heads as in DiT; the tiny size is ours."""

PATCH_SIZES = (1, 2, 4, 8)


def family_of(model: str) -> FamilyRow | None:
    """The family of a denoiser's name, such as "D-EMOv2-S-2" or "sit-xl/2"; None for other names."""
    parts = model.replace("/", "-").lower().rsplit("-", 2)
    known = {name.lower(): name for name in FAMILIES}
    return FAMILIES[known[parts[0]]] if len(parts) == 3 and parts[0] in known else None
