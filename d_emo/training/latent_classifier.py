"""The task of training a classifier of a codec's latents, whose features show a denoiser's without decoding them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from d_emo.config import ClassifierSettings
from d_emo.data import ClassImages, matched
from d_emo.errors import InputError
from d_emo.io.snapshot import load_meta
from d_emo.latents import LatentDataset, load_codec, sample_moments
from d_emo.models.registry import TIMM
from d_emo.training.classifier import ClassifierTask, mixed

SMALLEST_SIDE = 32
"""Classifiers halve what they see five times."""

MADE_BY = ("encoder", "scaling", "shift")
"""What latents of one codec have in common, as the index beside them says it."""


class LatentDraws(NamedTuple):
    """What is random about the latents of a step."""

    flip: torch.Tensor  # (B,) bool
    posterior: torch.Tensor  # (B, C, h, w)
    level: torch.Tensor | None = None  # (B, 1, 1, 1), the share t of noise in (1 - t) latent + t noise
    noise: torch.Tensor | None = None  # (B, C, h, w)


class LatentClassifierTask(ClassifierTask):
    """Cross-entropy with label smoothing on stored latents.

    They are drawn from their posterior anew in each step, mixed with noise at their own size, and enlarged to
    ``image_size`` for the network. Accuracy is measured on the means of the posterior, without noise.

    Args:
        settings: Resolved settings, with ``latents``.

    Raises:
        InputError: Settings that cannot work together; latents or a model that cannot be opened.
    """

    def open(self, settings: ClassifierSettings) -> tuple[ClassImages, ClassImages | None]:
        latents, held_out = open_latents(settings)
        values, *sides = latents.index["moments_shape"]
        self.made_by = {key: latents.index[key] for key in MADE_BY}
        self.codec, self.latent_shape = latents.codec, (values // (4 if latents.index["mirrored"] else 2), *sides)
        side = settings.image_size or max(SMALLEST_SIDE, 4 * sides[0])
        if side < sides[0]:
            raise InputError(
                f"`image_size` {side} is less than the side of the latents in {settings.latents}, {sides[0]}; they are "
                "enlarged to it, 4 times where it is left away"
            )
        if settings.init_from is not None:
            there = load_meta(settings.init_from, self.kind).get("codec")
            if there != self.codec:
                raise InputError(
                    f"`init_from` {settings.init_from} is a classifier of "
                    f"{f'latents of the codec {there}' if there else 'images'}, not of latents of {self.codec}"
                )
        self.facts |= {"image_size": side}
        return latents, held_out

    def more_of_snapshots(self) -> dict[str, Any]:
        """The codec, the latents' side, and what tells latents of the same codec's name apart."""
        return {
            **super().more_of_snapshots(), "codec": self.codec, "latent_side": self.latent_shape[-1], **self.made_by
        }

    def input_options(self) -> dict[str, Any]:
        name = "in_chans" if self.settings.model.startswith(TIMM) else "in_channels"
        return {**super().input_options(), name: self.latent_shape[0]}

    def named_data(self) -> str:
        shape = " x ".join(map(str, self.latent_shape))
        return f"latents {shape} from {self.codec} in {self.settings.latents}, enlarged"

    def draw(self, generator: torch.Generator, batch_size: int) -> LatentDraws:
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
        step = LatentDraws(
            flip=torch.rand(batch_size, **drawn) < 0.5, posterior=torch.randn(batch_size, *self.latent_shape, **drawn)
        )
        if not self.settings.noise:
            return step
        level = torch.rand(batch_size, 1, 1, 1, **drawn) * self.settings.noise
        return step._replace(level=level, noise=torch.randn(batch_size, *self.latent_shape, **drawn))

    def views(self, values: torch.Tensor, draws: LatentDraws) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents, and what the network sees. Shape: (B, 2 C or 4 C, h, w) -> (B, C, h, w), (B, C, side, side)."""
        latents = self._latents(values, draws)
        return latents, enlarged(mixed(latents, draws), self.settings.image_size)

    def seen(self, batch: list[torch.Tensor], draws: LatentDraws) -> torch.Tensor:
        latents = mixed(self._latents(batch[0], draws), draws)
        return load_codec(self.codec).to(latents.device).decode(latents)

    def _latents(self, moments: torch.Tensor, draws: LatentDraws) -> torch.Tensor:
        """Latents of stored moments, those of the mirror image where the draw says so. Shape: -> (B, C, h, w)."""
        moments = moments.float()
        if self.dataset.flip:
            plain, mirrored = moments.chunk(2, dim=1)
            moments = torch.where(draws.flip[:, None, None, None], mirrored, plain)
        return sample_moments(moments, draws.posterior)

    def as_measured(self, model: nn.Module) -> nn.Module:
        return OfMoments(model, self.settings.image_size)


class OfMoments(nn.Module):
    """A classifier of latents that takes what is stored of them, and looks at their means.

    Shape: (B, 2 C, h, w) -> (B, num_classes).
    """

    def __init__(self, model: nn.Module, side: int):
        super().__init__()
        self.model, self.side = model, side
        self.train(model.training)

    def forward(self, moments: torch.Tensor) -> torch.Tensor:
        return self.model(enlarged(moments.float().chunk(2, dim=1)[0], self.side))


def enlarged(latents: torch.Tensor, side: int) -> torch.Tensor:
    """Latents as a classifier of them takes them, bilinearly. Shape: (B, C, h, w) -> (B, C, side, side)."""
    return F.interpolate(latents, (side, side), mode="bilinear", align_corners=False)


def open_latents(settings: ClassifierSettings) -> tuple[LatentDataset, ClassImages | None]:
    """The latents to train on, and those to measure accuracy on, where there are some.

    InputError for latents of one class only, or that do not belong together.
    """
    latents, held_out = LatentDataset(settings.latents, flip=settings.flip), None
    names = latents.class_names
    if len(names) < 2:
        raise InputError(f"{settings.latents} has only the class {names[0]}; a classifier needs two or more")
    if settings.validate_dir is not None:
        held_out = LatentDataset(Path(settings.validate_dir), flip=False)
        for key in (*MADE_BY, "image_size"):
            here, there = (each.index[key] for each in (latents, held_out))
            if here != there:
                raise InputError(
                    f"the latents in `validate_dir` {settings.validate_dir} have {key} {there}, those in "
                    f"{settings.latents} {here}; encode the held-out images in the same way"
                )
        return latents, matched(held_out, names, settings.validate_dir)
    if settings.validate_every is not None:
        raise InputError("`validate_every` needs held-out latents: give their folder as `validate_dir`")
    return latents, None


def classifier_task(settings: ClassifierSettings) -> ClassifierTask:
    """The task of these settings: on images, or on latents."""
    return (ClassifierTask if settings.latents is None else LatentClassifierTask)(settings)
