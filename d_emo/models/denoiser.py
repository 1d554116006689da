"""The denoisers: D-EMO and the DiT baseline, in one frame that differs only in the block.

Sources: EMOv2 paper, section III-C3 and table XVI (D-EMO); DiT paper, section 3.2 (frame, initialisation).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.models.attention import AttentionMode
from d_emo.models.blocks import adaln_projection
from d_emo.models.contract import DenoiserFrame
from d_emo.models.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_position_embedding
from d_emo.models.layers import (
    LARGEST_COUNT,
    LARGEST_RATIO,
    MOST_BLOCKS,
    NORM_EPS,
    NormKind,
    checkpoint_block,
    is_count,
    is_ratio,
    pair,
)
from d_emo.tables import BLOCKS, load


@dataclass
class DenoiserOutput(Transformer2DModelOutput):
    """The prediction, and in training what the projector makes of a block's map; see `DenoiserFrame.project`."""

    features: Tensor | None = None


class FinalLayer(nn.Module):
    """adaLN and the linear map from a token to the p x p patch of the output.

    Shape: x (B, H, W, C), c (B, C) -> (B, H, W, p * p * C_out).
    """

    def __init__(self, dim: int, out_dim: int, *, affine: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=affine)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = adaln_projection(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # 2 x (B, C)
        return kernels.linear(self.linear, kernels.modulated_norm(self.norm, x, shift, scale))


class Denoiser(DenoiserFrame):
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

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    label_parameter = "y_embedder.embedding_table.weight"
    head = ("final_layer.",)
    fixed_tensors = ("pos_embed",)
    free_settings = ("num_classes", "sample_size", "window_size")

    @register_to_config
    def __init__(
        self, sample_size: int | tuple[int, int] = 32, patch_size: int = 2, in_channels: int = 4,
        out_channels: int | None = None, learn_sigma: bool = True, num_classes: int = 1000, hidden_size: int = 384,
        depth: int = 12, num_heads: int = 6, block: str = "i2rmb", expand_ratio: float = 4,
        attention_mode: AttentionMode = "spanning", window_size: int | tuple[int, int] = 8, kernel_size: int = 5,
        local_norm: NormKind = "batch", position_embedding: Literal["sincos", "none"] = "sincos",
    ) -> None:  # fmt: skip
        super().__init__()
        counts = {"patch_size": patch_size, "in_channels": in_channels, "num_classes": num_classes,
                  "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}  # fmt: skip
        for name, value in counts.items():
            largest = MOST_BLOCKS if name == "depth" else LARGEST_COUNT
            if not is_count(value, largest):
                raise InputError(f"{name} must be a positive integer of at most {largest:,}, got {value!r}.")
        if not is_ratio(expand_ratio):
            raise InputError(f"expand_ratio must be positive and at most {LARGEST_RATIO}, got {expand_ratio!r}.")
        if not isinstance(learn_sigma, bool):
            raise InputError(f"learn_sigma must be true or false, got {learn_sigma!r}.")
        height, width = self.sample_size = pair(sample_size, "sample_size")
        if height % patch_size or width % patch_size:
            raise InputError(f"sample_size {height}x{width} is not divisible by patch_size {patch_size}.")
        self.grid = height // patch_size, width // patch_size
        if hidden_size % 4:
            raise InputError(f"hidden_size must be a multiple of 4 for the position embedding, got {hidden_size}.")
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        if out_channels not in (None, self.out_channels):
            raise InputError(
                f"out_channels={out_channels} contradicts in_channels={in_channels} with learn_sigma={learn_sigma}, "
                f"which give {self.out_channels}; leave out_channels out."
            )
        self.register_to_config(out_channels=self.out_channels)

        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        if position_embedding not in ("sincos", "none"):
            raise InputError(f"Unknown position_embedding {position_embedding!r}; choose 'sincos' or 'none'.")
        positions = sincos_position_embedding(hidden_size, self.grid)  # (H * W, C)
        self.register_buffer("pos_embed", positions if position_embedding == "sincos" else positions * 0)
        row = BLOCKS[block]
        window = tuple(min(w, n) for w, n in zip(pair(window_size, "window_size"), self.grid, strict=True))
        options = {
            "attention_mode": attention_mode, "window_size": window, "kernel_size": kernel_size,
            "local_norm": local_norm,
        }  # fmt: skip
        options = {"num_heads": num_heads, "expand_ratio": expand_ratio, **{key: options[key] for key in row.options}}
        self.blocks = nn.ModuleList(load(row.module)(hidden_size, **options) for _ in range(depth))
        # FSDP's wrapping wants no class that is not there.
        self._no_split_modules = self._repeated_blocks = [type(self.blocks[0]).__name__]
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, affine=row.affine_final_norm)
        self.gradient_checkpointing = False
        self.projected, self.projector = 0, None  # see `project`
        self.initialize_weights()

    @classmethod
    def settings_for(cls, latent_shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
        channels, *sizes = latent_shape
        size = sizes[0] if len(set(sizes)) == 1 else tuple(sizes)
        return {"sample_size": size, "in_channels": channels, "num_classes": num_classes}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.config.in_channels, *self.sample_size

    @property
    def predicts_variance(self) -> bool:
        return self.config.learn_sigma

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        return self.config.hidden_size, *self.grid

    @property
    def feature_blocks(self) -> int:
        return len(self.blocks)

    def project(self, block: int, projector: nn.Module | None) -> None:
        if not 0 <= block < len(self.blocks):
            raise InputError(f"There is no block {block} in a denoiser of {len(self.blocks)}; the first is 0.")
        self.projected, self.projector = block, projector

    def block_matrices(self) -> dict[str, int]:
        stacked = {"qk": 2, "qkv": 3}
        return {
            name: stacked.get(name.split(".")[-2], 1) for name, parameter in self.named_parameters()
            if name.startswith("blocks.") and parameter.ndim == 2 and "adaLN_modulation" not in name
        }  # fmt: skip

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """DiT's initialisation: every block starts as the identity and the network's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The patch embedding is a linear layer written as a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.label_rows(), std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # Zero gates make every block the identity; a zero output projection makes the first prediction zero.
        for module in filter(lambda module: hasattr(module, "adaLN_modulation"), (*self.blocks, self.final_layer)):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable | None = None) -> None:
        """Trade compute for memory in training; batch-norm statistics are still updated once per step."""
        super().enable_gradient_checkpointing(gradient_checkpointing_func or checkpoint_block)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.nn.Module.compile`; with gradient checkpointing on, each block by itself, once for all.

        The compiler cannot look into checkpointing that leaves batch norm's statistics alone the second time.
        """
        (self.compile_repeated_blocks if self.gradient_checkpointing else super().compile)(*args, **kwargs)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None, return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:  # fmt: skip
        """Denoise one batch; ``cross_attention_kwargs`` is there for diffusers' pipelines and unused."""
        if not isinstance(hidden_states, torch.fx.Proxy) and hidden_states.shape[1:] != self.latent_shape:
            raise InputError(
                f"This model denoises latents of shape (batch, {', '.join(map(str, self.latent_shape))}), but got "
                f"{tuple(hidden_states.shape)}; build it with another sample_size or in_channels, or fit the latents."
            )
        x = self.x_embedder(hidden_states)  # (B, H, W, C)
        x = x + self.pos_embed.view(1, *self.grid, -1)  # (B, H, W, C)
        t = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])  # (B,)
        c = self.t_embedder(t) + self.y_embedder(class_labels)  # (B, C)
        features = None
        for index, block in enumerate(self.blocks):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c)  # (B, H, W, C)
            else:
                x = block(x, c)  # (B, H, W, C)
            if self.training and self.projector is not None and index == self.projected:
                features = self.projector(x)  # (B, D, H, W)
        sample = self.unpatchify(self.final_layer(x, c))  # (B, C_out, H * p, W * p)
        if features is not None:
            return DenoiserOutput(sample=sample, features=features)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put the patches back in place.

        Shape: (B, H, W, p * p * C_out) -> (B, C_out, H * p, W * p).
        """
        batch, p = x.shape[0], self.config.patch_size
        x = x.view(batch, *self.grid, p, p, self.out_channels).permute(0, 5, 1, 3, 2, 4)  # (B, C_out, H, p, W, p)
        return x.reshape(batch, self.out_channels, *self.sample_size)
