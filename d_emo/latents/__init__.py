"""Codecs between images and latents, and data sets that were encoded once to be trained on often."""

from d_emo.latents.codec import (
    SHIPPED,
    SHIPPED_VAE,
    Codec,
    PixelCodec,
    VAECodec,
    autoencoder_in,
    codec_of,
    default_codec,
    latent_side,
    load_codec,
    sample_moments,
)
from d_emo.latents.dataset import LatentDataset
from d_emo.latents.encode import encode

__all__ = [
    "SHIPPED", "SHIPPED_VAE", "Codec", "PixelCodec", "LatentDataset", "VAECodec", "autoencoder_in", "codec_of",
    "default_codec", "encode", "latent_side", "load_codec", "sample_moments",
]
