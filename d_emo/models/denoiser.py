"""The denoisers: D-EMO and the DiT baseline, in one frame that differs only in the block.

Sources: EMOv2 paper, section III-C3 and table XVI (D-EMO); DiT paper, section 3.2 (frame, initialisation).
"""

from collections.abc import Callable

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from d_emo.errors import InputError
from d_emo.models.attention import AttentionMode
from d_emo.models.layers import LARGEST_RATIO, NormKind, is_ratio
from d_emo.models.token_denoiser import PositionEmbedding, TokenDenoiser, check_counts


class Denoiser(TokenDenoiser):
    """Predicts the noise (and, with learned sigma, its variance) in a latent, given the timestep and the class.

    Runs in ``diffusers.DiTPipeline`` as it is. Labels are not dropped here: that belongs to the training objective,
    which passes `null_class` for "no class".

    Args:
        sample_size: height and width of the latent, one number or (height, width).
        patch_size: side of the square patch that becomes one token.
        in_channels: channels of the latent.
        out_channels: channels of the output. Leave it out: it follows from ``learn_sigma`` and is recorded in the
            config, because diffusers' pipelines read it there.
        learn_sigma: predict the variance too, which doubles the output channels.
        num_classes: classes without the null class; 1 for unconditional models.
        hidden_size: channels C of a token.
        depth: number of blocks.
        num_heads: attention heads; divides ``hidden_size``.
        block: a name of `d_emo.tables.BLOCKS`: "i2rmb" for D-EMO, "dit" for the baseline.
        expand_ratio: width of the value (i2rmb) or of the MLP (dit) over C.
        attention_mode: "near", "far" or "spanning"; this and the next three are for blocks that take them (i2rmb).
        window_size: window of the attention; an axis shorter than the window uses the whole axis.
        kernel_size: kernel of the depthwise convolution.
        local_norm: norm of the depthwise convolution: "batch" (the paper's), "layer" or "none".
        position_embedding: "sincos", the fixed one of DiT, or "none" (all zeros), to see what it is worth.

    Shape: hidden_states (B, C_in, H, W), timestep () or (B,), class_labels (B,) -> sample (B, C_out, H, W).

    Raises:
        InputError: for a combination that cannot work, and for an input of another size than ``sample_size``.
    """

    @register_to_config
    def __init__(
        self, sample_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
        out_channels: int | None = None, learn_sigma: bool = True, num_classes: int = 1000, hidden_size: int = 384,
        depth: int = 12, num_heads: int = 6, block: str = "i2rmb", expand_ratio: float = 4,
        attention_mode: AttentionMode = "spanning", window_size: int | tuple[int, int] = 8, kernel_size: int = 5,
        local_norm: NormKind = "batch", position_embedding: PositionEmbedding = "sincos",
    ) -> None:  # fmt: skip
        super().__init__()
        check_counts(hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        if hidden_size % 4:
            raise InputError(f"hidden_size must be a multiple of 4 for the position embedding, got {hidden_size}.")
        if not is_ratio(expand_ratio):
            raise InputError(f"expand_ratio must be positive and at most {LARGEST_RATIO}, got {expand_ratio!r}.")
        self._begin(
            sample_size=sample_size, patch_size=patch_size, in_channels=in_channels, out_channels=out_channels,
            learn_sigma=learn_sigma, num_classes=num_classes, dim=hidden_size, condition_dim=hidden_size,
            position_embedding=position_embedding,
        )  # fmt: skip
        self.blocks = self._blocks(depth, hidden_size, num_heads, self.grid, hidden_size)
        self._finish(hidden_size, hidden_size)

    @property
    def feature_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.config.hidden_size, *self.grid),) * len(self.blocks)

    def block_sequence(self) -> list[nn.Module]:
        return list(self.blocks)

    def trunk(self, x: Tensor, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> Tensor:
        return run(self.blocks, x)  # (B, H, W, C)
