"""Classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from d_emo import kernels
from d_emo.config import FidSettings, SampleSettings, check_guidance
from d_emo.errors import InputError
from d_emo.models.contract import DenoiserFrame


@dataclass(frozen=True)
class Guidance:
    """How to guide: null + scale * (given - null).

    Attributes:
        scale: 1 is none and costs one forward pass instead of two.
        channels: ``all`` latent channels, or ``3``: the first three, as in the published numbers of DiT.
        interval: Part of the noise path, from 0 (data) to 1 (noise), on which to guide; outside it, as with scale 1.

    Raises:
        InputError: Values that mean nothing.
    """

    scale: float = 1.0
    channels: Literal["all", "3"] = "all"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        check_guidance(self.scale, self.interval)
        if str(self.channels) not in ("all", "3"):
            raise InputError(f"`guidance_channels` must be all or 3, not {self.channels!r}")

    @classmethod
    def of(cls, settings: SampleSettings | FidSettings) -> Guidance:
        """That of settings; of several scales the first."""
        scale = settings.guidance_scale[0] if isinstance(settings.guidance_scale, list) else settings.guidance_scale
        return cls(scale, settings.guidance_channels, tuple(settings.guidance_interval))

    def at(self, noise: float) -> float:
        """The scale at a place of the noise path, from 0 to 1."""
        return self.scale if self.interval[0] <= noise <= self.interval[1] else 1.0


@kernels.fixed()  # a seed gives the same bits, whatever was timed on this machine
def guided(
    denoiser: DenoiserFrame, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float, channels: str = "all"
) -> torch.Tensor:
    """The denoiser's output with its prediction pushed away from that of the null class.

    Shape: x (B, C, h, w), t (), labels (B,) -> (B, C or 2 C, h, w) float32.
    """
    if scale == 1:
        return denoiser(x.to(denoiser.dtype), timestep=t, class_labels=labels).sample.float()
    both = torch.cat([labels, torch.full_like(labels, denoiser.null_class)])
    output = denoiser(torch.cat([x, x]).to(denoiser.dtype), timestep=t, class_labels=both).sample.float()
    given, null = output.chunk(2)
    count = x.shape[1] if channels == "all" else 3
    prediction = null[:, :count] + scale * (given[:, :count] - null[:, :count])
    return torch.cat([prediction, given[:, count:]], dim=1)
