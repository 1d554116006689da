"""The task of training a codec: an autoencoder of the user's images, or of the built-in ones."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.utils import save_image

from d_emo.config import VAESettings
from d_emo.data import ClassImages, Mixture, Reading, in_recorded_order, open_dataset, open_held_out, spread
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.files import write_json
from d_emo.io.card import describe_hardware
from d_emo.io.snapshot import save_autoencoder
from d_emo.latents import Codec, codec_of
from d_emo.latents.codec import DECODER
from d_emo.models.counting import trained_parameters
from d_emo.tables import DATASETS, LABEL_BASE
from d_emo.training.autoencoders import Trained, create_trained, in_float16, open_start
from d_emo.training.finetuning import train_only, trained_before
from d_emo.training.parallel import micro_batch_of
from d_emo.training.perceptual import PerceptualDistance
from d_emo.weights import check_library

RISE = 0.15
"""Share of the steps in which the noise on the latents grows to its full size."""
SAMPLE, AT_ONCE = 1024, 32
"""Training images that the variance of the latents is measured on, at most; of a micro-batch, how many at once."""
COLUMNS, LARGEST = 6, 128
"""Images of a data set in the picture of a snapshot; pixels of their sides, unless they are larger."""


class Draws(NamedTuple):
    """What is random about the images of a step."""

    flip: torch.Tensor  # (B,) bool
    posterior: torch.Tensor  # (B, C, h, w)
    noise: torch.Tensor | None = None  # (B, C, h, w), of a standard deviation of its own for each image


class VAETask:
    """Reconstructions, pixel by pixel and in a classifier's features; a posterior; classes read from the latents.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; data that cannot be opened.
    """

    lr_scales: dict[str, float] = {}
    smaller = "Choose fewer steps, smaller images or a GPU."
    step = 0

    def __init__(self, settings: VAESettings):
        check_library()
        settings = settings.resolve()
        start, facts, meta = (None, {}, {}) if settings.init_from is None else open_start(settings)
        settings = settings.resolve(**facts)
        self.dataset, self.measured_on = open_images(settings)
        for images in self.measured_on.values():
            images[0]  # a folder of what is no image is told before the run, not at its first snapshot
        self.facts = {**facts, "images": len(self.dataset), "flip": self.dataset.flip}
        self.perceptual = None
        if settings.perceptual_features is not None:
            self.perceptual = PerceptualDistance(settings.perceptual_features)
        self.settings = settings = settings.resolve(**self.facts)
        self.places, self.base = [1], len(self.dataset.class_names)
        if not settings.digits_share and (parts := DATASETS[settings.dataset].label_parts) and not settings.data_dir:
            self.places, self.base = list(parts.values()), LABEL_BASE
        logits = len(self.places) * self.base if settings.class_weight else 0
        self.model, self.latent_shape = create_trained(settings, logits, start)
        self.parameters, self.start, self.started_from = trained_parameters(self.model.vae), [], trained_before(meta)
        if start is not None:
            trained = f" (step {meta['step']:,})" if meta else ""
            words = train_only(self.model.vae, settings.train, head=DECODER)
            self.start = [f"Weights from {settings.init_from}{trained}.", words]
        self.device, share = torch.device("cpu"), max(1, settings.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
        self.at_once = min(AT_ONCE, micro_batch_of(settings, share, best_device()))

    @property
    def held_out(self) -> ClassImages | None:
        """Those of the data themselves."""
        return next(iter(self.measured_on.values()), None)

    def introduction(self) -> list[str]:
        settings, shape = self.settings, " x ".join(map(str, self.latent_shape))
        trained = trained_parameters(self.model.vae) / 1e6
        digits = f", {settings.digits_share:.0%} of them digits" * bool(settings.digits_share)
        return [
            f"{settings.model}: {trained:.2f} M trained parameters, latents {shape} of "
            f"{settings.image_size} px; {len(self.dataset):,} images of {settings.data_name()}{digits}; run folder "
            f"{settings.output_dir}",
            *filter(None, [self.dataset.left_out, *self.start]),
        ]

    def keep_classes(self, recorded: Sequence[str] | None) -> None:
        self.dataset = in_recorded_order(self.dataset, recorded)

    def prepare(self, device: torch.device, folder: Path) -> None:
        self.device = device
        if self.perceptual is not None:
            self.perceptual.to(device)

    def draw(self, generator: torch.Generator, batch_size: int) -> Draws:
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
        step = Draws(
            flip=(torch.rand(batch_size, **drawn) < 0.5) & self.dataset.flip,
            posterior=torch.randn(batch_size, *self.latent_shape, **drawn),
        )
        if not self.settings.latent_noise:
            return step
        deviation = torch.randn(batch_size, 1, 1, 1, **drawn).abs()
        return step._replace(noise=deviation * torch.randn(batch_size, *self.latent_shape, **drawn))

    def loss(self, model: nn.Module, batch: list[torch.Tensor], draws: Draws) -> dict[str, torch.Tensor]:
        settings, images = self.settings, self.seen(batch, draws)
        level = settings.latent_noise * min(1.0, self.step / (RISE * settings.max_steps))
        given = model(images, draws.posterior, None if draws.noise is None else level * draws.noise)
        decoded = given["images"].float()
        losses = {"mse": F.mse_loss(decoded, images), "l1": F.l1_loss(decoded, images)}
        total = losses["mse"] + settings.l1_weight * losses["l1"]
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(images, decoded)
            total = total + settings.perceptual_weight * losses["perceptual"]
        if "kl" in given:
            losses["kl"] = given["kl"]
            total = total + settings.kl_weight * given["kl"]
        if "logits" in given:
            logits = given["logits"].float().unflatten(1, (len(self.places), self.base)).flatten(0, 1)
            labels = torch.stack([batch[1] // place % self.base for place in self.places], dim=1).flatten()
            losses["cross_entropy"] = F.cross_entropy(logits, labels) * len(self.places)
            losses["class_accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
            total = total + settings.class_weight * losses["cross_entropy"]
        return {"loss": total, **losses}

    def seen(self, batch: list[torch.Tensor], draws: Draws) -> torch.Tensor:
        return torch.where(draws.flip[:, None, None, None], batch[0].flip(-1), batch[0])

    def finished(self, model: Trained) -> nn.Module:
        """The autoencoder as a snapshot stores it."""
        return model.finished(in_batches(self.dataset, spread(len(self.dataset), SAMPLE), self.device, self.at_once))

    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Sums of each data set's squared errors over this process's share, and the numbers of its images."""
        sums, codec = {}, codec_of(self.finished(model))
        for name, images in self.measured_on.items():
            mine = spread(len(images), self.settings.validate_images)[rank::world_size]
            sums |= {name: self._errors(codec, images, mine), f"{name} count": len(mine)}
        return {name: torch.tensor(value, dtype=torch.float64, device=self.device) for name, value in sums.items()}

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return {f"psnr_{name}": psnr(sums[name] / sums[f"{name} count"]) for name in self.measured_on}

    def remarks(self, count: Callable[[torch.Tensor], Any]) -> list[str]:
        return self.dataset.remarks(count)

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings, vae = self.settings, self.finished(model)
        codec, half = codec_of(vae), in_float16(vae)
        measured, counts = {}, {}
        for name, images in self.measured_on.items():
            chosen = spread(len(images), settings.validate_images)
            counts[name] = len(chosen)
            measured[name] = round(psnr(self._errors(codec, images, chosen) / len(chosen)), 2)
        meta = {
            "step": step, "weights": "ema", "image_size": settings.image_size, "data": self.dataset.name,
            "class_names": self.dataset.class_names, "num_images": len(self.dataset), "parameters": self.parameters,
            "channels": codec.channels, "downsample": codec.downsample, "training_minutes": round(minutes, 1),
            "hardware": describe_hardware(self.device), "psnr": measured, "held_out": counts,
            "dtype": "float16" if half else "float32",
        }
        if self.started_from:
            meta["started_from"] = self.started_from
        rows = [row for images in self.measured_on.values() or [self.dataset] for row in self._pair(codec, images)]
        shown = F.interpolate(torch.cat(rows) * 0.5 + 0.5, scale_factor=max(1, LARGEST // settings.image_size))

        def more(temporary: Path) -> None:
            if measured:
                write_json(temporary / "psnr.json", measured)
            save_image(shown, temporary / "reconstructions.png", nrow=COLUMNS, padding=4)

        save_autoencoder(folder, vae.half() if half else vae, meta=meta, settings=settings, more=more)

    def _errors(self, codec: Codec, images: ClassImages, indices: Sequence[int]) -> float:
        return squared_errors(codec, images, indices, self.device, self.at_once)

    def _pair(self, codec: Codec, images: ClassImages) -> Iterator[torch.Tensor]:
        """Images from all over a data set, and their reconstructions. Shape: -> (6, 3, H, W)."""
        chosen = list(islice(cycle(spread(len(images), COLUMNS)), COLUMNS))
        for batch in in_batches(images, chosen, self.device, self.at_once):
            yield batch
            yield reconstructed(codec, batch)


def in_batches(
    images: ClassImages, indices: Sequence[int], device: torch.device, at_once: int
) -> Iterator[torch.Tensor]:
    """Images, so many at once. Shape: -> (B, 3, H, W)."""
    for start in range(0, len(indices), at_once):
        yield torch.stack([images[index][0] for index in indices[start : start + at_once]]).to(device)


def reconstructed(codec: Codec, images: torch.Tensor) -> torch.Tensor:
    """What a codec makes of the means of images' posteriors. Shape: (B, 3, H, W) -> same."""
    return codec.decode(codec.moments(images).chunk(2, dim=1)[0])


def squared_errors(
    codec: Codec, images: ClassImages, indices: Sequence[int], device: torch.device, at_once: int = AT_ONCE
) -> float:
    """Sum over images of the mean squared error of their reconstructions."""
    return sum(
        F.mse_loss(reconstructed(codec, batch), batch, reduction="none").mean(dim=(1, 2, 3)).sum().item()
        for batch in in_batches(images, indices, device, at_once)
    )


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]."""
    return 10 * math.log10(4 / max(mean_squared_error, 1e-12))


def open_images(settings: VAESettings) -> tuple[ClassImages, dict[str, ClassImages]]:
    """The images to train on, and by name those to measure on, which own data may come without.

    Without ``class_weight`` their classes are one, so that a folder may be flat. InputError for classes that are asked
    for where there is one, and for data that do not belong together.
    """
    one_class, size = not settings.class_weight, settings.image_size
    images = open_dataset(
        dataset=settings.dataset, data_dir=settings.data_dir, image_size=size, num_images=settings.num_images,
        skip_corrupt=settings.skip_corrupt, one_class=one_class, reading=Reading.of(settings), flip=settings.flip,
    )
    if not one_class and len(images.class_names) < 2:
        raise InputError(f"`class_weight` {settings.class_weight} needs two or more classes; {settings.data_dir} has "
                         f"only {images.class_names[0]}")  # fmt: skip
    held_out = {}
    if settings.data_dir is None or settings.validate_dir is not None or settings.validate_every is not None:
        held_out[settings.data_name()] = open_held_out(settings, images.class_names, one_class=one_class)
    if settings.digits_share:
        digits = {split: open_dataset(dataset="digits", data_dir=None, image_size=size, split=split,
                                      one_class=one_class) for split in ("train", "test")}  # fmt: skip
        images = Mixture(images, digits["train"], settings.digits_share)
        held_out["digits"] = digits["test"]
    return images, held_out
