"""Classifier-free guidance, and autoguidance by a weaker denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from d_emo import kernels
from d_emo.config import DEFAULT_GUIDE_WEIGHT, FidSettings, SampleSettings, check_guidance
from d_emo.errors import InputError
from d_emo.io.snapshot import DenoiserSnapshot
from d_emo.models.contract import DenoiserFrame


@dataclass(frozen=True)
class Guidance:
    """How to guide: given + (scale - 1) (given - null) + (weight - 1) (given - weaker).

    The first two terms are classifier-free guidance, null + scale (given - null) (Ho and Salimans, 2022); the first
    and the last autoguidance, weaker + weight (given - weaker) (Karras et al., 2024, eq. 4), where "weaker" is the
    prediction of another denoiser for the same class.

    Attributes:
        scale: 1 is none and costs one forward pass instead of two.
        channels: ``all`` latent channels, or ``3``: the first three, as in the published numbers of DiT.
        interval: Part of the noise path, from 0 (data) to 1 (noise), on which to guide; outside it, as with scale and
            weight 1.
        weight: Of autoguidance, where there is a weaker denoiser; 1 is none.

    Raises:
        InputError: Values that mean nothing.
    """

    scale: float = 1.0
    channels: Literal["all", "3"] = "all"
    interval: tuple[float, float] = (0.0, 1.0)
    weight: float = DEFAULT_GUIDE_WEIGHT

    def __post_init__(self):
        check_guidance(self.scale, self.interval)
        if not 0 <= self.weight < float("inf"):
            raise InputError(f"`guide_weight` must be finite and not negative, not {self.weight}")
        if str(self.channels) not in ("all", "3"):
            raise InputError(f"`guidance_channels` must be all or 3, not {self.channels!r}")

    @classmethod
    def of(cls, settings: SampleSettings | FidSettings) -> Guidance:
        """That of settings; of several scales the first."""
        scale = settings.guidance_scale[0] if isinstance(settings.guidance_scale, list) else settings.guidance_scale
        weight = DEFAULT_GUIDE_WEIGHT if settings.guide_weight is None else settings.guide_weight
        return cls(scale, settings.guidance_channels, tuple(settings.guidance_interval), weight)

    def at(self, noise: float) -> tuple[float, float]:
        """Scale and weight at a place of the noise path, from 0 to 1."""
        return (self.scale, self.weight) if self.interval[0] <= noise <= self.interval[1] else (1.0, 1.0)


@kernels.fixed()  # a seed gives the same bits, whatever was timed on this machine
def guided(
    denoiser: DenoiserFrame, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float,
    channels: str = "all", guide: DenoiserFrame | None = None, weight: float = 1.0,
) -> torch.Tensor:
    """The denoiser's output with its prediction pushed away from that of the null class, and from that of a weaker one.

    Shape: x (B, C, h, w), t (), labels (B,) -> (B, C or 2 C, h, w) float32.
    """
    count = x.shape[1] if channels == "all" else 3
    given, output = _of_classes(denoiser, x, t, labels, scale, count)
    if guide is None or weight == 1:
        return output
    weaker = guide(x.to(guide.dtype), timestep=t, class_labels=labels).sample.float()
    pushed = output[:, :count] + (weight - 1) * (given[:, :count] - weaker[:, :count])
    return torch.cat([pushed, output[:, count:]], dim=1)


def _of_classes(
    denoiser: DenoiserFrame, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for the classes as it is, and guided by that of the null class."""
    if scale == 1:
        given = denoiser(x.to(denoiser.dtype), timestep=t, class_labels=labels).sample.float()
        return given, given
    both = torch.cat([labels, torch.full_like(labels, denoiser.null_class)])
    output = denoiser(torch.cat([x, x]).to(denoiser.dtype), timestep=t, class_labels=both).sample.float()
    given, null = output.chunk(2)
    prediction = null[:, :count] + scale * (given[:, :count] - null[:, :count])
    return given, torch.cat([prediction, given[:, count:]], dim=1)


def check_guide(guide: DenoiserSnapshot, snapshot: DenoiserSnapshot) -> None:
    """Refuse a snapshot that cannot guide another, because its prediction means something else.

    Raises:
        InputError: It is of another objective, noise schedule, codec, size of latents, or of other classes.
    """
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    facts = {
        "the objective": lambda each: each.objective,
        "the noise schedule": lambda each: [each.scheduler_config.get(name) for name in names],
        "the codec": lambda each: each.codec,
        "latents of shape": lambda each: each.model.latent_shape,
        "the number of classes": lambda each: len(each.class_names),
        "class": lambda each: next(
            (f"{label} {each.class_names[label]}" for label, (one, other) in both if one != other), None
        ),
    }
    both = list(enumerate(zip(guide.class_names, snapshot.class_names, strict=False)))
    for what, of in facts.items():
        theirs, ours = of(guide), of(snapshot)
        if theirs != ours:
            raise InputError(
                f"`guide` {guide.path} cannot guide {snapshot.path}: {what} {theirs} there, {ours} here; an earlier "
                "or smaller snapshot trained for the same is needed"
            )
