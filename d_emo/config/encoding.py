"""Settings of the codec: training a VAE, and encoding data by one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d_emo.config.base import Settings, overwrite_setting, setting
from d_emo.config.ranges import Count, Fraction, ImageSide, NotNegative, Positive, Seed, Workers
from d_emo.config.training import DataSettings
from d_emo.errors import InputError
from d_emo.files import read_json


@dataclass(frozen=True, kw_only=True)
class VAESettings(Settings):
    """Settings of ``scripts/train_vae.py``; the defaults made the VAE that ships with the package."""

    output_dir: str = setting(
        "results/vae", "folder for the VAE, its model card and a grid of reconstructions. The default is numbered if "
        "it exists", group="Run", output="folder"
    )
    overwrite: bool = overwrite_setting()
    image_size: ImageSide = setting(64, "side of the training images in pixels", group="Data")
    block_out_channels: list[Count] = setting(
        [24, 48, 96, 128], "channels from full to eighth resolution", group="Model"
    )
    max_steps: Count = setting(6000, "optimizer steps", group="Run")
    batch_size: Count = setting(16, "images per step", group="Optimisation")
    digits_share: Fraction = setting(0.25, "fraction of digits in a batch; the rest is Shapes-1000", group="Data")
    learning_rate: Positive = setting(
        1e-3, "peak learning rate of the one-cycle (warm-up, then cosine) schedule", group="Optimisation",
        aliases=["--lr"]
    )
    kl_weight: NotNegative = setting(1e-4, "weight of the mean Kullback-Leibler term per latent value")
    seed: Seed = setting(0, "seed of the initial weights, the data order and the posterior noise", group="Run")

    def check(self) -> None:
        if not self.block_out_channels or any(width % 8 or width > 2**16 for width in self.block_out_channels):
            raise InputError(
                f"`block_out_channels` must be multiples of 8, for the group norms, not {self.block_out_channels}"
            )

    def is_made(self, output: Path) -> bool:
        try:
            made = read_json(output / "config.yaml")
        except InputError:
            return False
        return made == self.to_record() and (output / "reconstructions.png").exists()  # the last file of all


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DataSettings):
    """Settings of ``scripts/encode_latents.py``."""

    output: str = setting(
        help="folder for the shards and their index; an unfinished one is resumed", group="Output", output="run"
    )
    shard_size: Count = setting(4096, "images per file; what a stopped run may have to encode again")
    vae: str | None = setting(
        None, "codec: pixels, d-emo-f8, a local folder of a VAE or a hub name. "
        "Default: d-emo-f8 for built-in data, stabilityai/sd-vae-ft-ema for --data-dir", group="Latents",
        source="or a name"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = setting(
        "float16", "type of the stored means and standard deviations"
    )
    batch_size: Count = setting(64, "images that a process encodes at once", group="Machine")
    num_workers: Workers | None = setting(
        None, "data loading processes per rank. Default: 0 on a CPU, up to 8 on a GPU"
    )
