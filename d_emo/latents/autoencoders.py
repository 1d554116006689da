"""Codecs over autoencoders that give latents without a posterior: deep compression, and representations of a ViT."""

import torch
from torch import nn

from d_emo.errors import InputError
from d_emo.latents.codec import VAECodec, by_channel, check_channels, factors_of


class DCCodec(VAECodec):
    """A diffusers ``AutoencoderDC`` (DC-AE; Chen et al., 2025): a thirty-second or less of the side, no posterior.

    Raises:
        InputError: It is not of RGB images, or its factors cannot be used.
    """

    def __init__(self, vae: nn.Module, name: str):
        self.vae, self.name = vae.eval().requires_grad_(False), name
        check_channels(name, vae.config.in_channels, vae.config.in_channels)
        self.downsample, self.channels = vae.spatial_compression_ratio, vae.config.latent_channels
        self.scaling, self.shift = factors_of(vae.config, self.channels, name)

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        latents = self.vae.encode(self._prepared(images).to(self.vae.dtype)).latent.float()
        scaling, shift = (by_channel(factor, images.device) for factor in (self.scaling, self.shift))
        return torch.cat([(latents - shift) * scaling, torch.zeros_like(latents)], dim=1)

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the autoencoder takes them. Shape: (B, 3, H, W) -> same."""
        return images


class RAECodec(DCCodec):
    """A diffusers ``AutoencoderRAE`` (RAE; Zheng et al., 2025): the tokens of a frozen ViT, and a decoder of them.

    It takes and gives images in [0, 1] of one size, and normalises the latents itself, so the factors here are 1 and 0.

    Attributes:
        image_size: Of the images.

    Raises:
        InputError: It is not of RGB images, or gives its tokens in a row.
    """

    def __init__(self, vae: nn.Module, name: str):
        self.vae, self.name = vae.eval().requires_grad_(False), name
        check_channels(name, vae.config.num_channels, vae.config.num_channels)
        if not vae.config.reshape_to_2d:
            raise InputError(f"the VAE {name} gives its latents as a row of tokens; `reshape_to_2d` true is needed")
        self.image_size, self.downsample = vae.decoder_image_size, vae.decoder_patch_size
        self.channels, self.scaling, self.shift = vae.config.encoder_hidden_size, 1.0, 0.0

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        return (images + 1) / 2

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        images = self.vae.decode(latents.to(self.vae.dtype)).sample.float() * 2 - 1
        return images.where(images.isfinite(), torch.nan).clamp(-1, 1)
