"""Trains the small VAE that ships with the package: f8, 4 latent channels, on Shapes-1000 and digits."""

import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.utils import save_image
from tqdm import tqdm

from d_emo.config import VAESettings, write_yaml
from d_emo.data import ClassImages, Digits, Shapes1000
from d_emo.device import best_device
from d_emo.files import filling, write_json
from d_emo.io.card import describe_hardware, write_card_file
from d_emo.latents import VAECodec
from d_emo.weights import check_library, telling_unmet


def train_vae(settings: VAESettings) -> dict[str, float]:
    """Train by mean squared error plus a small KL term, set the scaling factor, measure, write the VAE and its card.

    Returns:
        Held-out PSNR in dB for "shapes" and "digits".
    """
    check_library()
    with telling_unmet():
        from diffusers import AutoencoderKL
    device = best_device()
    torch.manual_seed(settings.seed)
    levels = len(settings.block_out_channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(settings.block_out_channels), layers_per_block=1, latent_channels=4,
        norm_num_groups=8, mid_block_add_attention=False, sample_size=settings.image_size,
    ).to(device, memory_format=torch.channels_last)  # fmt: skip
    shapes, digits = Shapes1000(settings.image_size, seed=settings.seed), Digits(settings.image_size)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    peak, steps = settings.learning_rate, settings.max_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.05)
    started = time.monotonic()
    bar = tqdm(range(settings.max_steps), desc="VAE", unit="step")
    for step in bar:
        images = _batch(shapes, digits, settings, step).to(device, memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, images)
        loss = error + settings.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(psnr=f"{_psnr(error.item()):.2f} dB")
    vae.eval()
    with torch.no_grad():  # 1 / standard deviation of the latents of training images, both sets pooled
        batches = (_batch(shapes, digits, settings, -1 - number) for number in range(16))
        latents = torch.cat([vae.encode(images.to(device)).latent_dist.sample() for images in batches])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    held_out = {"shapes": Shapes1000(settings.image_size, num_images=1000, split="test", seed=settings.seed),
                "digits": Digits(settings.image_size, split="test")}
    with filling(Path(settings.output_dir)) as output:
        vae.half().save_pretrained(output)
        vae = AutoencoderKL.from_pretrained(output, use_safetensors=True).to(device)  # measured as shipped
        psnr = {name: reconstruction_psnr(vae, dataset, device) for name, dataset in held_out.items()}
        _write_card(output, settings, vae, psnr, minutes=(time.monotonic() - started) / 60)
        codec, rows = VAECodec(vae, "vae"), []
        for dataset in held_out.values():
            images = torch.stack([dataset[i * len(dataset) // 6][0] for i in range(6)]).to(device)
            rows += [images, codec.decode(codec.moments(images).chunk(2, dim=1)[0])]
        enlarged = F.interpolate(torch.cat(rows) * 0.5 + 0.5, scale_factor=max(1, 128 // settings.image_size))
        save_image(enlarged, output / "reconstructions.png", nrow=6, padding=4)
    return psnr


def _batch(shapes: ClassImages, digits: ClassImages, settings: VAESettings, step: int) -> torch.Tensor:
    """A mixed batch that depends on (seed, step) alone. Shape: (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    num_digits = round(settings.batch_size * settings.digits_share)
    from_shapes = torch.randint(len(shapes), (settings.batch_size - num_digits,), generator=generator).tolist()
    from_digits = torch.randint(len(digits), (num_digits,), generator=generator).tolist()
    return torch.stack([shapes[i][0] for i in from_shapes] + [digits[i][0] for i in from_digits])


@torch.no_grad()
def reconstruction_psnr(vae, dataset: ClassImages, device: torch.device) -> float:
    """PSNR in dB of decoded posterior means, from the mean squared error over all images of the set."""
    total, codec = 0.0, VAECodec(vae, "vae")
    for start in range(0, len(dataset), 50):
        images = torch.stack([dataset[i][0] for i in range(start, min(start + 50, len(dataset)))]).to(device)
        decoded = codec.decode(codec.moments(images).chunk(2, dim=1)[0])
        total += F.mse_loss(decoded, images, reduction="none").mean(dim=(1, 2, 3)).sum().item()
    return _psnr(total / len(dataset))


def _psnr(mean_squared_error: float) -> float:
    return 10 * math.log10(4 / mean_squared_error)  # the images span [-1, 1]


def _write_card(output: Path, settings: VAESettings, vae, psnr: dict[str, float], minutes: float) -> None:
    millions = sum(p.numel() for p in vae.parameters()) / 1e6
    write_yaml(settings, output / "config.yaml")
    write_json(output / "psnr.json", {k: round(v, 2) for k, v in psnr.items()})
    about = f"""An `AutoencoderKL` (diffusers) with {millions:.2f} M parameters that maps an RGB image to 4 channels
at an eighth of its side; scaling factor {vae.config.scaling_factor}, weights in float16. It serves the built-in data
sets of D-EMO and is no VAE for photographs: use one such as `stabilityai/sd-vae-ft-mse` there.

* Data: Shapes-1000 and scikit-learn's digits (share {settings.digits_share}) at {settings.image_size} px.
* Training: {settings.max_steps:,} steps of batch {settings.batch_size}, {minutes:.0f} minutes on
  {describe_hardware(vae.device)}, by `python scripts/train_vae.py` with `config.yaml` beside this file.
* Reconstruction PSNR on held-out images: {psnr["shapes"]:.2f} dB on 1,000 of Shapes-1000, {psnr["digits"]:.2f} dB on
  359 digits.

![Held-out images above their reconstructions](reconstructions.png)"""
    licence = """## Licence

Apache-2.0. The digits are scans from the UCI repository, which gives them under CC BY 4.0."""
    write_card_file(
        output, title="d-emo-f8: a small VAE", sections=[about, licence], library_name="diffusers", tags=["vae"]
    )
