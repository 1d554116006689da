"""Codecs between images and latents; the only owner of the scaling factor."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm

from d_emo.config import InputError
from d_emo.data import ClassImages

SHIPPED = Path(__file__).parent / "pretrained"
SHIPPED_VAE = "d-emo-f8"


class Codec(Protocol):
    """What maps images in [-1, 1] to latents of about unit variance, and back.

    Attributes:
        name: The name that :func:`load_codec` takes to open the same codec again.
        downsample: Pixels per latent position along a side.
        channels: Latent channels.
    """

    name: str
    downsample: int
    channels: int

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

    name, downsample, channels = "pixels", 1, 3

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

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        mean = (posterior.mean.float() - self.shift) * self.scaling
        return torch.cat([mean, posterior.std.float() * self.scaling], dim=1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        z = latents.float() / self.scaling + self.shift
        return self.vae.decode(z.to(self.vae.dtype)).sample.float().clamp(-1, 1)

    def to(self, device: torch.device) -> VAECodec:
        self.vae.to(device)
        return self


def load_codec(name: str) -> Codec:
    """Open a codec by name.

    Args:
        name: ``pixels``; ``d-emo-f8`` (the small VAE that ships with the package); a local folder, or the name of a
            repository on the Hugging Face hub, of an ``AutoencoderKL`` (also a pipeline's, in its sub-folder ``vae``).

    Raises:
        InputError: There is no such codec, or the hub cannot be reached; says what to do.
    """
    if name == "pixels":
        return PixelCodec()
    from diffusers import AutoencoderKL

    if name == SHIPPED_VAE:
        return VAECodec(AutoencoderKL.from_pretrained(SHIPPED / SHIPPED_VAE, use_safetensors=True), name)
    looks_local = Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise InputError(
            f"there is no VAE {name!r}: give {SHIPPED_VAE}, pixels, a folder that AutoencoderKL.save_pretrained wrote, "
            "or a hub name such as stabilityai/sd-vae-ft-mse"
        )
    folder = Path(name).expanduser() if looks_local else name
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
            f"copy FOLDER here and give --vae FOLDER; or use --vae {SHIPPED_VAE}, which needs no network"
        ) from None
    return VAECodec(vae, name)


class CachedLatents(Dataset):
    """Posterior moments of every image of a data set, in memory; an item is (moments, label).

    With a data set that may be flipped, the moments of the mirror image follow along the channels: a latent itself
    cannot be mirrored. The moments are stored in float16 and written to ``path`` for the next start.

    Args:
        images: The data set.
        codec: Its moments are stored.
        path: File of an earlier pass; used if it was made from the same images and codec, written otherwise.
        device: Where to encode.
    """

    def __init__(self, images: ClassImages, codec: Codec, *, path: Path, device: torch.device, batch_size: int = 64):
        self.images = images
        made_from = {
            "data": images.name, "images": str(len(images)), "image_size": str(images.image_size), "codec": codec.name,
            "seed": str(getattr(images, "seed", 0)), "scaling": str(getattr(codec, "scaling", 1.0)),
        }
        if _metadata(path) != made_from:
            moments = self._encode(codec, device, batch_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = torch.tensor([images.label(index) for index in range(len(images))])
            save_file({"moments": moments, "labels": labels}, path, metadata=made_from)
        stored = load_file(path)
        self.moments, self.labels = stored["moments"], stored["labels"]

    def _encode(self, codec: Codec, device: torch.device, batch_size: int) -> torch.Tensor:
        parts = []
        for start in tqdm(range(0, len(self.images), batch_size), desc="encoding the data set", unit="batch"):
            rows = range(start, min(start + batch_size, len(self.images)))
            batch = torch.stack([self.images[index][0] for index in rows]).to(device)
            moments = [codec.moments(batch)] + ([codec.moments(batch.flip(-1))] if self.images.flip else [])
            parts.append(torch.cat(moments, dim=1).half().cpu())
        return torch.cat(parts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.moments[index], int(self.labels[index])


def _metadata(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
