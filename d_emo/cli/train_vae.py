"""``d-emo train-vae``."""

from collections.abc import Iterator
from pathlib import Path

from d_emo.cli.trained import report
from d_emo.config import VAESettings
from d_emo.errors import said
from d_emo.io.hub import prepare_push
from d_emo.io.snapshot import load_meta
from d_emo.training import fit
from d_emo.training.vae import VAETask


def run(settings: VAESettings) -> None:
    """Do it."""
    task = VAETask(settings)
    if settings.dry_run:
        from d_emo.cli.doctor import dry_run_of_images

        return dry_run_of_images(task)
    prepare_push(settings.push_to_hub)
    report(fit(task, settings), settings, quality)


def quality(snapshot: Path) -> Iterator[str]:
    """Its PSNR on held-out images, where there are any, and how it is used."""
    meta = load_meta(snapshot, "autoencoder")
    if not meta["psnr"]:
        yield said("PSNR      not measured: there are no held-out images; name some with `validate_dir`")
    for name, value in meta["psnr"].items():
        yield f"PSNR      {value:.2f} dB on {meta['held_out'][name]:,} held-out images of {name}"
    yield f"use it    --vae {snapshot}"
