"""Autoencoders of diffusers as they are trained, and what becomes of one in a snapshot."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from d_emo.config import VAESettings
from d_emo.errors import InputError, PackageError
from d_emo.latents.codec import autoencoder_class, check_depths, codec_of, latent_side
from d_emo.models.registry import check_weights
from d_emo.tables import AUTOENCODERS, load
from d_emo.weights import first_line, telling_unmet

EPS = 1e-6
"""Added to the variance of the latents that are normalised."""


class Trained(nn.Module):
    """An autoencoder and, of ``logits``, a linear classifier of its latents; both see the latents with their noise.

    Args:
        vae: With a scaling factor of 1.
        latent_shape: (C, h, w).
        logits: Number of them; 0: no classifier.

    Attributes:
        fixed: Arguments of the autoencoder's class that are no choice.
    """

    fixed: ClassVar[dict[str, Any]]

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int], logits: int):
        super().__init__()
        self.vae = vae
        self.head = nn.Linear(math.prod(latent_shape), logits) if logits else None

    @staticmethod
    def defaults(settings: VAESettings) -> dict[str, Any]:
        """Arguments of the autoencoder's class where ``model_options`` do not say otherwise."""
        raise NotImplementedError

    @staticmethod
    def scale(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Give an autoencoder latents of variance 1, by those of a sample. Shape: mean, std (N, C, h, w)."""
        raise NotImplementedError

    @staticmethod
    def unit(latents: torch.Tensor) -> torch.Tensor | float:
        """Standard deviation that noise is measured in. Shape: (B, C, h, w) -> (B, 1, 1, 1) or ()."""
        return latents.detach().std(dim=(1, 2, 3), correction=0, keepdim=True)

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents, and the loss of their distribution, where it has one. Shape: (B, 3, H, W) -> (B, C, h, w), ()."""
        raise NotImplementedError

    def forward(
        self, images: torch.Tensor, posterior: torch.Tensor, noise: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Reconstructions, under "images"; "kl", a mean over latent values; "logits".

        Shape: images (B, 3, H, W), posterior and noise (B, C, h, w) -> (B, 3, H, W), (), (B, logits).
        """
        latents, parts = self.latents(images.contiguous(memory_format=torch.channels_last), posterior)  # (B, C, h, w)
        if noise is not None:
            latents = latents + noise * self.unit(latents)
        if self.head is not None:
            parts["logits"] = self.head(latents.flatten(1))
        return {"images": self.vae.decode(latents).sample, **parts}

    @torch.no_grad()
    def finished(self, batches: Iterable[torch.Tensor]) -> nn.Module:
        """The autoencoder as it is stored: latents of variance 1, weights rounded to float16.

        Args:
            batches: Images that the variance is measured on. Shape: (B, 3, H, W) each.
        """
        vae = copy.deepcopy(self.vae).float()
        codec = codec_of(vae)
        mean, std = torch.cat([codec.moments(batch) for batch in batches]).chunk(2, dim=1)
        self.scale(vae, mean, std)
        return vae.half().float()


class TrainedKL(Trained):
    """`AutoencoderKL`: latents drawn from a posterior; its scaling factor is 1 over their standard deviation."""

    fixed = {"in_channels": 3, "out_channels": 3, "block_out_channels": None, "scaling_factor": 1.0,
             "shift_factor": None, "latents_mean": None, "latents_std": None}  # fmt: skip

    @staticmethod
    def defaults(settings: VAESettings) -> dict[str, Any]:
        widths = settings.block_out_channels
        return {
            "block_out_channels": tuple(widths), "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "up_block_types": ("UpDecoderBlock2D",) * len(widths), "layers_per_block": 1, "latent_channels": 4,
            "norm_num_groups": 8, "mid_block_add_attention": False, "sample_size": settings.image_size,
        }

    @staticmethod
    def scale(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        variance = mean.var() + std.square().mean()
        vae.register_to_config(scaling_factor=round(1 / variance.clamp(min=EPS).sqrt().item(), 5))

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        given = self.vae.encode(images).latent_dist
        given = type(given)(given.parameters.float())
        return given.mean + given.std * posterior, {"kl": given.kl().mean() / given.mean[0].numel()}


class TrainedDC(Trained):
    """`AutoencoderDC` (DC-AE; Chen et al., 2025): a batch norm without parameters behind the encoder.

    A snapshot has it in the encoder's last convolution, beside which there must be no shortcut then. Trained with noise
    on the normalised latents, the decoder is that of RAE (Zheng et al., 2025).
    """

    fixed = {"in_channels": 3, "encoder_block_out_channels": None, "scaling_factor": 1.0, "encoder_out_shortcut": False}

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int], logits: int):
        super().__init__(vae, latent_shape, logits)
        self.norm = nn.BatchNorm2d(latent_shape[0], EPS, affine=False, track_running_stats=False)

    @staticmethod
    def defaults(settings: VAESettings) -> dict[str, Any]:
        widths, count = tuple(settings.block_out_channels), len(settings.block_out_channels)
        both = {"block_out_channels": widths, "layers_per_block": (1,) * count, "qkv_multiscales": ((),) * count}
        return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}

    @staticmethod
    def scale(vae: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
        conv, by_channel = vae.encoder.conv_out, (0, 2, 3)
        deviation = (mean.var(by_channel) + EPS).sqrt()  # (C,)
        conv.weight.div_(deviation[:, None, None, None])
        conv.bias.sub_(mean.mean(by_channel)).div_(deviation)

    @staticmethod
    def unit(latents: torch.Tensor) -> torch.Tensor | float:
        return 1.0

    def latents(self, images: torch.Tensor, posterior: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return self.norm(self.vae.encode(images).latent.float()), {}


def create_trained(settings: VAESettings, logits: int) -> tuple[Trained, tuple[int, int, int]]:
    """The network that the settings name, with random weights, and the shape of its latents.

    Raises:
        InputError: ``model_options`` that are fixed, unknown or do not go together; an image size that does not fit.
    """
    row, options = AUTOENCODERS[settings.model], settings.model_options or {}
    kind: type[Trained] = load(row.network)
    if taken := sorted(kind.fixed.keys() & options.keys()):
        raise InputError(f"`model_options`: {taken[0]} is no choice or a setting of its own; leave it out")
    check_depths(settings.model, options)
    chosen = {name: value for name, value in kind.fixed.items() if value is not None}
    chosen = {**kind.defaults(settings), **options, **chosen}
    vae = autoencoder_class(settings.model)
    with telling_unmet():
        shape = _tried(vae, chosen, settings)
        torch.manual_seed(settings.seed)
        return kind(vae(**chosen), shape, logits).to(memory_format=torch.channels_last), shape


@torch.no_grad()
def _tried(vae: type[nn.Module], options: Mapping[str, Any], settings: VAESettings) -> tuple[int, int, int]:
    """The shape of the latents, found without weights."""
    try:
        with torch.device("meta"):
            made = vae(**options)
            codec, size = codec_of(made, settings.model), settings.image_size
            check_weights(made, f"{settings.model} with {settings.model_options}")
            shape = (codec.channels, *[latent_side(codec, size)] * 2)
            images = torch.zeros(2, 3, size, size)  # one would be too few for norms of a single value
            codec.moments(images)
            if codec.decode(torch.zeros(2, *shape)).shape != images.shape:
                raise InputError(f"`model_options` {settings.model_options} make images of another size than they take")
    except (InputError, PackageError):
        raise
    except Exception as error:  # diffusers checks few of its arguments
        raise InputError(
            f"`model_options` {settings.model_options} with `block_out_channels` {settings.block_out_channels} make no "
            f"{settings.model} ({first_line(error)})"
        ) from None
    return shape
