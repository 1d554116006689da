"""One-step generation: a flow network goes on being trained by the Frechet distance of its images' features.

Source: FD-loss (Yang et al., 2026): the distance of published tables as a loss, over running statistics of what the
network draws, so that a batch may be small. No teacher, no adversary, no derivative along the path.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.errors import InputError
from d_emo.objective import FlowObjective, FlowSampleObjective, StepNoise


class RunningMoments(nn.Module):
    """First and second moments of features, over what a network drew of late; a part of the model in training states.

    A batch's moments enter with weight 1 - b, b = min(decay, n / (n + 1)) after n batches, and they alone have a
    gradient: m = b m + (1 - b) mean(f), S = b S + (1 - b) mean(f f').

    Args:
        dim: Of a feature vector.
        decay: b of a long run.
    """

    def __init__(self, dim: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("second", torch.zeros(dim, dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance with a batch in them; kept where they are finite.

        Shape: (B, D) -> (D,), (D, D) float64.
        """
        kept = min(self.decay, 1 - 1 / (1 + self.batches.item()))
        features = features.double()
        mean = kept * self.mean.double() + (1 - kept) * features.mean(0)
        second = kept * self.second.double() + (1 - kept) * features.mT @ features / len(features)
        if mean.isfinite().all() and second.isfinite().all():
            self.mean.copy_(mean.detach())
            self.second.copy_(second.detach())
            self.batches += 1
        return mean, second - mean[:, None] * mean


class Judge(nn.Module):
    """Turns latents into the features of a classifier, with gradients, and has the moments of real images.

    Args:
        network: An EMO classifier.
        codec: Its ``decoded`` passes gradients.
        side: Of the classifier's images.
    """

    def __init__(self, network: nn.Module, codec: Any, side: int):
        super().__init__()
        self.network, self.codec, self.side = network.eval().requires_grad_(False), codec, side
        self.mean = self.root = None

    def features(self, images: Tensor) -> Tensor:
        """Pooled features of images in [-1, 1]. Shape: (B, 3, H, W) -> (B, D)."""
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        return self.network.forward_head(self.network.forward_features(images), pre_logits=True).float()

    def forward(self, latents: Tensor) -> Tensor:
        return self.features(self.codec.decoded(latents))

    def learn(self, mean: Tensor, covariance: Tensor) -> None:
        """The moments of the features of real images. Shape: (D,), (D, D)."""
        values, vectors = torch.linalg.eigh(covariance.double())
        self.mean, self.root = mean.double(), (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    def distance(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Frechet distance to the real images, |m - m_r|^2 + tr(S) + tr(S_r) - 2 tr((S_r^1/2 S S_r^1/2)^1/2).

        The last trace is the sum of the roots of eigenvalues, whose gradient needs no distance between them.

        Shape: (D,), (D, D) float64 -> ().
        """
        both = self.root @ covariance @ self.root
        values = torch.linalg.eigvalsh((both + both.mT) / 2).clamp(min=0)
        overlap = (values + 1e-8 * values.detach().max()).sqrt().sum()
        traces = covariance.trace() + self.root.square().sum()
        return (mean - self.mean).square().sum() + traces - 2 * overlap


class _OneStep(FlowObjective):
    """What both kinds share: the image is what one Euler step makes of noise, x_0 = noise - v(noise, t = 1).

    Args:
        fd_features, fd_decay, fd_images: Read by whoever makes the `judge`.
        options: Those of `Objective`.

    Attributes:
        judge: A `Judge` that has learnt; to be set before the first loss.
        moments: The model's `RunningMoments`; likewise.
    """

    def __init__(self, *, fd_features: str = "", fd_decay: float = 0.999, fd_images: int = 0, **options: Any):
        super().__init__(**options)
        self.fd_features, self.fd_decay, self.fd_images = fd_features, fd_decay, fd_images
        self.kept: dict[str, Any] = {}  # no parts of this module: they are the task's and the model's

    def draw_timesteps(self, generator: torch.Generator, batch_size: int) -> Tensor:
        return torch.full((batch_size,), float(self.num_train_timesteps), device=generator.device)

    def forward(self, denoiser: nn.Module, latents: Tensor, labels: Tensor, step: StepNoise) -> dict[str, Tensor]:
        predicted, _ = self.predict(denoiser, step.noise, labels, step)
        drawn = step.noise - self.scheduled(predicted, step.noise, 1.0)
        distance = self.kept["judge"].distance(*self.kept["moments"](self.kept["judge"](drawn)))
        return {"loss": distance.float(), "fd": distance.detach().float()}


class OneStepObjective(_OneStep):
    """One step of a network that predicts the velocity."""

    prediction_type = "flow_one_step"


class OneStepSampleObjective(_OneStep, FlowSampleObjective):
    """One step of a network that predicts x_0."""

    prediction_type = "flow_one_step_sample"


def check_one_process(world_size: int) -> None:
    """Refuse several processes, whose running statistics would differ.

    Raises:
        InputError: There are several.
    """
    if world_size > 1:
        raise InputError("`objective` one-step keeps its statistics in one process; start one, with a larger batch")
