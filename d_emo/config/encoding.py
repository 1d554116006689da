"""Settings of the codec: training a VAE, and encoding data by one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from d_emo.config.base import setting
from d_emo.config.exact import with_exact_snapshots
from d_emo.config.finetuning import FineTuningSettings
from d_emo.config.ranges import BelowOne, Count, Fraction, ImageSide, NotNegative, Positive, Whole, Workers
from d_emo.config.training import DataSettings, HeldOutSettings, RehearsedSettings, RunSettings
from d_emo.errors import InputError
from d_emo.tables import AUTOENCODERS, SomeRows

SIDE, WIDTHS = 64, {"AutoencoderKL": [24, 48, 96, 128], "AutoencoderDC": [32, 32, 64, 128, 256, 256]}
"""Of a codec that starts from nothing: side of its images; channels."""
MOST_LEVELS = 14
"""Of an autoencoder: the largest images are of 65,536 px, and the smallest latents of 8."""


@dataclass(frozen=True, kw_only=True)
class VAESettings(FineTuningSettings, HeldOutSettings, RunSettings, RehearsedSettings):
    """Settings of ``scripts/train_vae.py``; the defaults are for such a VAE as ships with the package."""

    output_dir: str | None = setting(
        None, "run folder: settings, snapshots, states, logs. Default: results/<model>-<data>-<size>",
        resumable=True, group="Run", output="run"
    )
    init_from: str | None = setting(
        None, "start from this codec: d-emo-f8, a local folder of a VAE, a snapshot or run folder of train-vae, or a "
        "hub name. --model, --block-out-channels and --model-options are its own, --image-size too unless given",
        source="or a name", group="Fine-tuning", snapshot=True
    )
    train: Literal["all", "decoder"] = setting(
        "all", "which weights: all; or decoder: latents, scaling and shift stay those of --init-from, and so what was "
        "encoded and trained with it stays valid"
    )
    model: str | None = setting(
        None, "class of diffusers: AutoencoderKL, latents with a posterior, of an eighth of the side; "
        "AutoencoderDC, deep compression, normalised latents of a thirty-second. Default: AutoencoderKL",
        group="Model", choices=SomeRows(AUTOENCODERS, lambda row: row.network is not None)
    )
    block_out_channels: list[Count] | None = setting(
        None, "channels at each resolution, each half the one before; n of them make the latents' side "
        "1 / 2^(n - 1) of the image's. Default: 24 48 96 128, of AutoencoderDC 32 32 64 128 256 256", nargs="+"
    )
    model_options: dict[str, Any] | None = setting(
        None, "more arguments of the class, e.g. '{latent_channels: 16, layers_per_block: 2}'"
    )
    image_size: ImageSide | None = setting(
        None, "side of the (centre-cropped) images in pixels. Default: 64", group="Data"
    )
    digits_share: Fraction | None = setting(
        None, "fraction of images that are digits, beside the built-in shapes. Default: 0.25 of those without "
        "--class-weight and --init-from, else 0"
    )
    l1_weight: NotNegative = setting(
        0.0, "weight of the mean absolute error, beside the mean squared error of 1", group="Loss"
    )
    perceptual_features: str | None = setting(
        None, "emov2:SNAPSHOT (or a run folder), a classifier of images, in whose features reconstructions are "
        "compared too", snapshot=True
    )
    perceptual_weight: NotNegative | None = setting(
        None, "with --perceptual-features: weight of the distance in them. Default: 0.1"
    )
    kl_weight: NotNegative | None = setting(
        None, "AutoencoderKL: weight of the mean Kullback-Leibler term per latent value. Default: 1e-4"
    )
    latent_noise: NotNegative = setting(
        0.0, "noise on the latents that the decoder sees, in standard deviations of theirs: of each image one that is "
        "drawn from |N(0, s^2)|, s reaching this after 15 % of the steps; the decoder learns to forgive a denoiser's "
        "errors. With --train decoder: of latents scaled as a denoiser sees them"
    )
    class_weight: NotNegative = setting(
        0.0, "weight of the cross-entropy of a linear classifier of the noisy latents; of Shapes-1000 the sum of "
        "three, of shape, colour and ground"
    )
    batch_size: Count = setting(16, "images per step over all processes (global)", group="Optimisation")
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 6,000", resumable=True, decisive=True
    )
    micro_batch_size: Count | None = setting(
        None, "images that a process takes at once; gradients accumulate. Default: up to 8 on a CPU, all on a GPU; all "
        "for AutoencoderDC, whose batch norm sees no more", resumable=True, decisive=True
    )
    learning_rate: Positive | None = setting(
        None, "peak learning rate of AdamW. Default: 1e-3, with --init-from 1e-4", aliases=["--lr"]
    )
    warmup_steps: Whole | None = setting(
        None, "steps of linear warm-up. Default: a twentieth of all", resumable=True, decisive=True
    )
    schedule: Literal["constant", "cosine", "constant-cosine"] = setting("cosine", "learning rate after the warm-up")
    grad_clip: Positive | None = setting(1.0, "largest gradient norm")
    ema_decay: BelowOne = setting(0.999, "decay of the moving average of weights and float buffers")
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    snapshot_every: Count = setting(
        5_000, "steps between snapshots, each measured, with a picture; the last step has one", resumable=True
    )
    state_every: Count = setting(500, "steps between training states; the newest two are kept", resumable=True)
    push_to_hub: str | None = setting(
        None, "OWNER/NAME on the Hugging Face hub: push the last snapshot there when the run is complete, with images "
        "of your data in its reconstructions.png. A new repository is private; log in with `hf auth login` first",
        resumable=True
    )

    def check(self) -> None:
        widths = self.block_out_channels
        widths = WIDTHS[self.model or "AutoencoderKL"] if widths is None else widths
        if self.init_from is None and (not 0 < len(widths) <= MOST_LEVELS or max(widths) > 2**16):
            raise InputError(f"`block_out_channels` must be 1 to {MOST_LEVELS} numbers up to 65,536, not {widths}")
        if self.init_from is None and self.model != "AutoencoderDC" and any(width % 8 for width in widths):
            raise InputError(f"`block_out_channels` must be multiples of 8, for the group norms, not {widths}")
        for name in ("kl_weight", "class_weight") if self.train == "decoder" else ():
            if getattr(self, name):
                raise InputError(f"`{name}` {getattr(self, name):g} is for the encoder, which `train` decoder keeps; "
                                 "leave it away")  # fmt: skip
        if self.kl_weight and self.model == "AutoencoderDC":
            raise InputError(f"`kl_weight` {self.kl_weight:g} is for AutoencoderKL; AutoencoderDC has no posterior; "
                             "leave it away")  # fmt: skip
        if self.perceptual_weight is not None and self.perceptual_features is None:
            raise InputError(f"`perceptual_weight` {self.perceptual_weight:g} is for distances in "
                             "`perceptual_features`; name these, or leave it away")  # fmt: skip
        if self.digits_share and (self.data_dir is not None or self.dataset != "shapes"):
            raise InputError(f"`digits_share` {self.digits_share} belongs to the built-in shapes; leave it away")
        super().check()

    def resolve(self, **facts: Any) -> VAESettings:
        """Fill in what is left open; ``epochs`` once the data are known.

        Args:
            facts: "images", how many there are to train on, and "flip" of them; of the codec to start from "init_from",
                by which it is opened again, "model", "block_out_channels", "model_options" and "image_size".
        """
        there = facts
        if self.init_from is None:
            model = self.model or "AutoencoderKL"
            there = {"model": model, "block_out_channels": WIDTHS[model], "image_size": SIDE}
        left_open = [name for name in ("model", "block_out_channels", "image_size") if getattr(self, name) is None]
        steps, shapes = self.steps(facts.get("images"), 6_000), self.data_dir is None and self.dataset == "shapes"
        mixed = shapes and not self.class_weight and self.init_from is None
        warmup = self.warmup_steps if self.warmup_steps is not None or steps is None else steps // 20
        model, size = (getattr(self, name) or there.get(name) for name in ("model", "image_size"))
        default = replace(self, image_size=size).run_folder(model) if model else None
        own_norm, posterior = (model == name and self.train == "all" for name in ("AutoencoderDC", "AutoencoderKL"))
        return with_exact_snapshots(replace(
            self, output_dir=self.output_dir or default, max_steps=steps, warmup_steps=warmup,
            digits_share=0.25 * mixed if self.digits_share is None else self.digits_share,
            flip=facts.get("flip") if self.flip is None else self.flip,
            kl_weight=1e-4 if self.kl_weight is None and posterior else self.kl_weight,
            perceptual_weight=0.1 if self.perceptual_features and self.perceptual_weight is None
            else self.perceptual_weight,
            learning_rate=self.learning_rate or (1e-3 if self.init_from is None else 1e-4),
            micro_batch_size=self.micro_batch_size or (self.batch_size if own_norm else None),
            init_from=facts.get("init_from", self.init_from), **{name: there.get(name) for name in left_open},
            model_options=facts.get("model_options", self.model_options),
        ))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DataSettings):
    """Settings of ``scripts/encode_latents.py``."""

    output: str = setting(
        help="folder for the shards and their index; an unfinished one is resumed", group="Output", output="run"
    )
    shard_size: Count = setting(4096, "images per file; what a stopped run may have to encode again")
    vae: str | None = setting(
        None, "codec: pixels, d-emo-f8, a local folder of a VAE, a run folder of train-vae or a hub name. "
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
