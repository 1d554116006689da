"""Train the small VAE on Shapes-1000 and digits, print its held-out PSNR and write it with its card."""

from d_emo.config import VAESettings, parse_settings, run_cli


def main() -> None:
    settings = parse_settings(VAESettings, __doc__)
    from d_emo.training.vae import train_vae

    for name, psnr in train_vae(settings).items():
        print(f"held-out {name}: PSNR {psnr:.2f} dB")
    print(f"wrote {settings.output_dir}")


if __name__ == "__main__":
    run_cli(main)
