"""``d-emo train-vae``."""

from d_emo.config import VAESettings
from d_emo.errors import RunError
from d_emo.training.vae import train_vae


def run(settings: VAESettings) -> None:
    """Do it.

    Raises:
        RunError: Ctrl-C came before the VAE was written.
    """
    try:
        measured = train_vae(settings)
    except KeyboardInterrupt:
        raise RunError("stopped by Ctrl-C; a VAE is written when it is complete, so nothing was") from None
    for name, psnr in measured.items():
        print(f"held-out {name}: PSNR {psnr:.2f} dB")
    print(f"wrote {settings.output_dir}")
