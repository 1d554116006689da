"""``d-emo train-vae``."""

from d_emo.config import VAESettings
from d_emo.training.vae import train_vae


def run(settings: VAESettings) -> None:
    """Do it."""
    for name, psnr in train_vae(settings).items():
        print(f"held-out {name}: PSNR {psnr:.2f} dB")
    print(f"wrote {settings.output_dir}")

