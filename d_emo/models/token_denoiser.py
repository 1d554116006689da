"""What denoisers of tokens share, whatever way their blocks are connected: patches in, condition, patches out.

Source: DiT paper, section 3.2 (frame, initialisation).
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from d_emo import kernels
from d_emo.errors import InputError
from d_emo.models.blocks import adaln_projection
from d_emo.models.contract import DenoiserFrame
from d_emo.models.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, patch_resize, sincos_position_embedding
from d_emo.models.layers import LARGEST_COUNT, MOST_BLOCKS, NORM_EPS, checkpoint_block, is_count, pair
from d_emo.tables import BLOCKS, load

PositionEmbedding = Literal["sincos", "none"]


def check_counts(**counts: Any) -> None:
    """Refuse numbers of channels, heads or blocks that nothing has.

    Raises:
        InputError: One is no positive integer, or beyond `LARGEST_COUNT` (of ``depth``, `MOST_BLOCKS`).
    """
    for name, value in counts.items():
        largest = MOST_BLOCKS if name == "depth" else LARGEST_COUNT
        if not is_count(value, largest):
            raise InputError(f"{name} must be a positive integer of at most {largest:,}, got {value!r}.")


@dataclass
class DenoiserOutput(Transformer2DModelOutput):
    """The prediction, and in training what the projector makes of a block's map; see `DenoiserFrame.project`."""

    features: Tensor | None = None


class FinalLayer(nn.Module):
    """adaLN and the linear map from a token to the p x p patch of the output.

    Shape: x (B, H, W, C), c (B, D) -> (B, H, W, p * p * C_out); D is C unless ``condition_dim`` says otherwise.
    """

    def __init__(self, dim: int, out_dim: int, *, affine: bool, condition_dim: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=affine)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = adaln_projection(dim, 2, condition_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)  # 2 x (B, C)
        return kernels.linear(self.linear, kernels.modulated_norm(self.norm, x, shift, scale))


class TokenDenoiser(DenoiserFrame):
    """A denoiser whose tokens are p x p patches of a latent, conditioned on the timestep and the class.

    A subclass records its settings, calls `_begin`, makes its blocks, calls `_finish`, and says in `trunk` how tokens
    go through the blocks. Runs in ``diffusers.DiTPipeline`` as it is. Labels are not dropped here: that belongs to the
    training objective, which passes `null_class` for "no class".

    Shape: hidden_states (B, C_in, H, W), timestep () or (B,), class_labels (B,) -> sample (B, C_out, H, W).
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    label_parameter = "y_embedder.embedding_table.weight"
    head = ("final_layer.",)
    fixed_tensors = ("pos_embed",)
    free_settings = ("num_classes", "sample_size", "window_size", "patch_size")

    def _begin(
        self, *, sample_size: int | tuple[int, int], patch_size: int, in_channels: int, out_channels: int | None,
        learn_sigma: bool, num_classes: int, dim: int, condition_dim: int, position_embedding: PositionEmbedding,
    ) -> None:  # fmt: skip
        """Patches, positions and the condition; ``dim`` channels of a token, ``condition_dim`` of the condition.

        Raises:
            InputError: Settings that cannot work.
        """
        check_counts(patch_size=patch_size, in_channels=in_channels, num_classes=num_classes)
        if not isinstance(learn_sigma, bool):
            raise InputError(f"learn_sigma must be true or false, got {learn_sigma!r}.")
        height, width = self.sample_size = pair(sample_size, "sample_size")
        if height % patch_size or width % patch_size:
            raise InputError(f"sample_size {height}x{width} is not divisible by patch_size {patch_size}.")
        self.grid = height // patch_size, width // patch_size
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        if out_channels not in (None, self.out_channels):
            raise InputError(
                f"out_channels={out_channels} contradicts in_channels={in_channels} with learn_sigma={learn_sigma}, "
                f"which give {self.out_channels}; leave out_channels out."
            )
        self.register_to_config(out_channels=self.out_channels)
        self.x_embedder = PatchEmbed(in_channels, dim, patch_size)
        self.t_embedder = TimestepEmbedder(condition_dim)
        self.y_embedder = LabelEmbedder(num_classes, condition_dim)
        if position_embedding not in ("sincos", "none"):
            raise InputError(f"Unknown position_embedding {position_embedding!r}; choose 'sincos' or 'none'.")
        positions = sincos_position_embedding(dim, self.grid)  # (H * W, C)
        self.register_buffer("pos_embed", positions if position_embedding == "sincos" else positions * 0)

    def _blocks(self, count: int, dim: int, num_heads: int, grid: tuple[int, int], condition_dim: int) -> nn.ModuleList:
        """Blocks of the kind that the config names, for a map of ``grid`` tokens."""
        config, row = self.config, BLOCKS[self.config.block]
        window = tuple(min(w, n) for w, n in zip(pair(config.window_size, "window_size"), grid, strict=True))
        options = {"num_heads": num_heads, "expand_ratio": config.expand_ratio}
        options |= {key: window if key == "window_size" else config[key] for key in row.options}
        if condition_dim != dim:
            options["condition_dim"] = condition_dim
        blocks = nn.ModuleList(load(row.module)(dim, **options) for _ in range(count))
        # FSDP's wrapping wants no class that is not there.
        self._no_split_modules = self._repeated_blocks = [type(blocks[0]).__name__]
        return blocks

    def _finish(self, dim: int, condition_dim: int) -> None:
        """The final layer, and DiT's initialisation of all."""
        affine = BLOCKS[self.config.block].affine_final_norm
        out_dim = self.config.patch_size**2 * self.out_channels
        self.final_layer = FinalLayer(dim, out_dim, affine=affine, condition_dim=condition_dim)
        self.gradient_checkpointing = False
        self.projected, self.projector = 0, None  # see `project`
        self.initialize_weights()

    def weights_from(self, other: DenoiserFrame) -> dict[str, Tensor]:
        """See `DenoiserFrame`. Of another patch size: the embedding is w B^+, the output map B W (`patch_resize`)."""
        weights, old, new = other.state_dict(), other.config.patch_size, self.config.patch_size
        if old != new:
            spread = patch_resize(old, new).to(self.device)  # B (new * new, old * old)
            kernel = weights["x_embedder.proj.weight"].flatten(2).to(spread)  # w (C, C_in, old * old)
            weights["x_embedder.proj.weight"] = (kernel @ torch.linalg.pinv(spread)).unflatten(2, (new, new))
            for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
                rows = weights[name].unflatten(0, (old * old, -1)).to(spread)  # W (old * old, C_out, ...)
                weights[name] = torch.einsum("no,oc...->nc...", spread, rows).flatten(0, 1)
        return weights

    @abstractmethod
    def block_sequence(self) -> list[nn.Module]:
        """All blocks, in the order in which tokens pass them."""

    @abstractmethod
    def trunk(self, x: Tensor, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> Tensor:
        """The tokens through all blocks; ``run(blocks, x)`` takes them through some, one after the other.

        Shape: (B, H, W, C) -> same.
        """

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

    def project(self, block: int, projector: nn.Module | None) -> None:
        self.feature_shape(block)  # or there is none
        self.projected, self.projector = block, projector

    @torch.no_grad()
    def features(self, block: int, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        self.feature_shape(block)  # or there is none
        x, c = self._embedded(hidden_states, timestep, class_labels)
        last, features = self.block_sequence()[block], None

        def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            nonlocal features
            for each in blocks:
                if features is None:
                    x = each(x, c)  # (B, H, W, C)
                    features = x if each is last else None
            return x

        self.trunk(x, run)  # what lies between levels still runs: blocks keep the shape of a map, so it fits
        return features.permute(0, 3, 1, 2)

    def block_matrices(self) -> dict[str, int]:
        stacked, outside = {"qk": 2, "qkv": 3}, ("x_embedder", "t_embedder", "y_embedder", "final_layer", "projector")
        return {
            name: stacked.get(name.split(".")[-2], 1) for name, parameter in self.named_parameters()
            if not name.startswith(outside) and parameter.ndim == 2 and "adaLN_modulation" not in name
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
        for module in self.modules():
            if hasattr(module, "adaLN_modulation"):
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

    def _embedded(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and condition of a batch; InputError for latents of another shape than ``latent_shape``.

        Shape: see `TokenDenoiser` -> (B, H, W, C), (B, D).
        """
        if not isinstance(hidden_states, torch.fx.Proxy) and hidden_states.shape[1:] != self.latent_shape:
            raise InputError(
                f"This model denoises latents of shape (batch, {', '.join(map(str, self.latent_shape))}), but got "
                f"{tuple(hidden_states.shape)}; build it with another sample_size or in_channels, or fit the latents."
            )
        x = self.x_embedder(hidden_states)  # (B, H, W, C)
        x = x + self.pos_embed.view(1, *self.grid, -1)  # (B, H, W, C)
        t = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])  # (B,)
        return x, self.t_embedder(t) + self.y_embedder(class_labels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None, return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:  # fmt: skip
        """Denoise one batch; ``cross_attention_kwargs`` is there for diffusers' pipelines and unused.

        Raises:
            InputError: Latents of another shape than ``latent_shape``.
        """
        x, c = self._embedded(hidden_states, timestep, class_labels)
        shown = self.block_sequence()[self.projected] if self.training and self.projector is not None else None
        features = None

        def run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            nonlocal features
            for block in blocks:
                if self.gradient_checkpointing and torch.is_grad_enabled():
                    x = self._gradient_checkpointing_func(block, x, c)  # (B, H, W, C)
                else:
                    x = block(x, c)  # (B, H, W, C)
                if block is shown:
                    features = self.projector(x)  # (B, D, H, W)
            return x

        sample = self.unpatchify(self.final_layer(self.trunk(x, run), c))  # (B, C_out, H * p, W * p)
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
