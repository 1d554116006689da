"""A block of a large depthwise convolution and an MLP; ``--model Conv-Ti-2`` trains a denoiser of it."""

from torch import Tensor, nn

from d_emo.tables import BLOCKS, FAMILIES, BlockRow, FamilyRow


class ConvBlock(nn.Module):
    """x + gate * MLP(u + DWConv(u)), u = LN(x) * (1 + scale) + shift. Shape: x (B, H, W, C), c (B, C) -> as x."""

    def __init__(self, hidden_size: int, *, num_heads: int, expand_ratio: float):  # it has no heads
        super().__init__()
        width = int(hidden_size * expand_ratio)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mix = nn.Conv2d(hidden_size, hidden_size, 7, padding=3, groups=hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, hidden_size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * hidden_size))  # starts at zero

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)[:, None, None].chunk(3, dim=-1)  # (B, 1, 1, C) each
        u = self.norm(x) * (1 + scale) + shift
        u = u + self.mix(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + gate * self.mlp(u)


BLOCKS.register(BlockRow(name="conv", module=ConvBlock))
FAMILIES.register(FamilyRow(name="Conv", block="conv"))
