"""Codecs between images and latents; the only owner of the scaling factor."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from d_emo.errors import InputError
from d_emo.files import digest_of_tensors, expand_home
from d_emo.tables import CODECS, load

SHIPPED = Path(__file__).parents[1] / "pretrained"
SHIPPED_VAE = "d-emo-f8"


class Codec(Protocol):
    """What maps images in [-1, 1] to latents of about unit variance, and back.

    Attributes:
        name: The name that `load_codec` takes to open the same codec again.
        downsample: Pixels per latent position along a side.
        channels: Latent channels.
        scaling: Factor of the latents, after ``shift`` was subtracted.
        shift: What is subtracted from the latents.
        fingerprint: Tells encoders apart: equal for two codecs that give the same latents but for scaling and shift.
    """

    name: str
    downsample: int
    channels: int
    scaling: float
    shift: float
    fingerprint: str

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Scaled mean and standard deviation of each latent. Shape: (B, 3, H, W) -> (B, 2 C, H / f, W / f)."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, clamped to [-1, 1]. Shape: (B, C, H / f, W / f) -> (B, 3, H, W)."""

    def to(self, device: torch.device) -> Codec:
        """Move to a device."""


def sample_moments(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from their posterior. Shape: (B, 2 C, H, W), (B, C, H, W) -> (B, C, H, W)."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * noise


class PixelCodec:
    """No codec: the latents are the pixels."""

    name, downsample, channels, scaling, shift, fingerprint = "pixels", 1, 3, 1.0, 0.0, "pixels"

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([images, torch.zeros_like(images)], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.clamp(-1, 1)

    def to(self, device: torch.device) -> PixelCodec:
        return self


class VAECodec:
    """A diffusers ``AutoencoderKL``; latents are (z - shift) * scaling with the factors of its config."""

    def __init__(self, vae: nn.Module, name: str):
        self.vae, self.name = vae.eval().requires_grad_(False), name
        self.scaling = vae.config.scaling_factor
        self.shift = getattr(vae.config, "shift_factor", None) or 0.0
        self.downsample = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels = vae.config.latent_channels

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the encoder's weights: a name may move, and VAEs that differ in the decoder alone share latents."""
        weights = (
            (f"{name} {tuple(value.shape)}", value.float()) for name, value in sorted(self.vae.state_dict().items())
            if not name.startswith(("decoder.", "post_quant_conv."))
        )  # fmt: skip
        return digest_of_tensors(weights)[:16]

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scaling
        return torch.cat([mean, posterior.std.float() * self.scaling], dim=1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        z = latents.float() / self.scaling + self.shift
        images = self.vae.decode(z.to(self.vae.dtype)).sample.float()
        return images.where(images.isfinite(), torch.nan).clamp(-1, 1)  # clamping alone would make infinity white

    def to(self, device: torch.device) -> VAECodec:
        self.vae.to(device)
        return self


def default_codec(data_dir: str | None) -> str:
    """The codec where none is named: the one that ships for built-in data, Stable Diffusion's for the user's own."""
    return SHIPPED_VAE if data_dir is None else "stabilityai/sd-vae-ft-ema"


def load_codec(name: str) -> Codec:
    """Open a codec by name.

    Args:
        name: A name of ``d_emo.tables.CODECS``; a local folder, or the name of a repository on the Hugging Face hub, of
            an ``AutoencoderKL`` (also a pipeline's, in its sub-folder ``vae``).

    Raises:
        InputError: There is no such codec, or the hub cannot be reached; says what to do.
    """
    if name in CODECS:
        return load(CODECS[name].open)()
    from diffusers import AutoencoderKL

    looks_local = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not expand_home(name).is_dir():
        raise InputError(
            f"the VAE {name!r} does not exist; give {', '.join(CODECS)}, a folder that AutoencoderKL.save_pretrained "
            "wrote, or a hub name such as stabilityai/sd-vae-ft-mse"
        )
    folder = expand_home(name) if looks_local else name
    inside_pipeline = looks_local and (folder / "vae").is_dir() and not (folder / "config.json").exists()
    try:
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae" if inside_pipeline else None, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        if looks_local:
            raise InputError(f"{name} does not hold a readable AutoencoderKL: {_first_line(error)}") from None
        raise InputError(
            f"the VAE {name!r} is not in the local cache and could not be fetched from the Hugging Face hub "
            f"({_first_line(error)}). On a machine with a network run `hf download {name} --local-dir FOLDER`, "
            f"copy FOLDER here and give `vae` FOLDER; or use `vae` {SHIPPED_VAE}, which needs no network"
        ) from None
    return VAECodec(vae, name)


def shipped_vae() -> VAECodec:
    """The small VAE that ships with the package."""
    from diffusers import AutoencoderKL

    return VAECodec(AutoencoderKL.from_pretrained(SHIPPED / SHIPPED_VAE, use_safetensors=True), SHIPPED_VAE)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
