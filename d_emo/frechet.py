"""One-step generation: a flow network goes on being trained by the Frechet distance of its images' features.

Source: FD-loss (Yang et al., 2026): the distance of published tables as a loss, over running statistics of what the
network draws, so that a batch may be small. No teacher, no adversary, no derivative along the path.
"""

from collections.abc import Sequence
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

    Features are taken from the mean over real images, which changes no distance and keeps the moments exact.

    Args:
        network: An EMO classifier; without ``stages`` any that has timm's ``forward_features`` and ``forward_head``.
        codec: Its ``decoded`` passes gradients.
        side: Of the classifier's images.
        class_names: Of the data.
        noise: The largest share of noise that is mixed into drawn and real images alike before they are looked at,
            (1 - t) x + t noise, t uniform in [0, noise]; what the classifier was trained with.
        stages: Take the means over positions of all four stages, each divided by its deviation over real images;
            otherwise the pooled features before the head, as they are.
        label_weight: Factor of the class means that stand beside the features (`joint`); 0 leaves them out.
    """

    def __init__(
        self, network: nn.Module, codec: Any, side: int, *, class_names: Sequence[str] = ("",), noise: float = 0.0,
        stages: bool = False, label_weight: float = 0.0
    ):
        super().__init__()
        self.network, self.codec, self.side = network.eval().requires_grad_(False), codec, side
        self.class_names, self.noise, self.stages, self.label_weight = class_names, noise, stages, label_weight
        self.mean = self.root = self.centre = self.scale = self.classes = None

    def features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features of images in [-1, 1] as the network gives them. Shape: (B, 3, H, W) -> (B, D)."""
        if images.shape[2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)
        if self.noise:  # without a generator the loop's, which it seeds by the step
            drawn: dict[str, Any] = {"generator": generator, "device": images.device}
            t = self.noise * torch.rand(len(images), 1, 1, 1, **drawn)
            images = (1 - t) * images + t * torch.randn(images.shape, **drawn)
        if self.stages:
            maps = self.network.forward_intermediates(images, norm=True, intermediates_only=True)
            return torch.cat([each.float().mean((2, 3)) for each in maps], dim=1)
        return self.network.forward_head(self.network.forward_features(images), pre_logits=True).float()

    def width(self, dim: int) -> int:
        """How many values `joint` gives, of features of so many."""
        return dim + bool(self.label_weight) * min(dim, len(self.class_names))

    def joint(self, features: Tensor, labels: Tensor) -> Tensor:
        """Centred features, and beside them the mean features of the class's real images, times ``label_weight``.

        The distance of both together is the Frechet joint distance (DeVries et al., 2019), in which a drawing must be
        what it was asked for. `learn` comes first.

        Shape: (B, D), (B,) -> (B, D + min(D, classes)), or (B, D) where classes have no weight.
        """
        features = (features - self.centre.to(features)) / self.scale.to(features)
        return torch.cat([features, self.classes[labels].to(features)], dim=1) if self.label_weight else features

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """What `joint` gives of what latents are decoded to. Shape: (B, C, h, w), (B,) -> (B, `width`)."""
        return self.joint(self.features(self.codec.decoded(latents)), labels)

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """The moments of `features` of real images, and the mean of each class.

        Shape: (N, D), (N,).

        Raises:
            InputError: Classes have a weight, and one has no image.
        """
        features = features.double()
        self.centre, self.scale = features.mean(0), torch.ones_like(features[0])
        if self.stages:  # what hardly moves on real images must not weigh most where a drawing moves it
            deviation = features.std(0)
            self.scale = deviation.clamp(min=1e-2 * deviation.median().item() + 1e-6)
        if self.label_weight:
            self._learn_classes((features - self.centre) / self.scale, labels)
        features = self.joint(features, labels)
        values, vectors = torch.linalg.eigh(features.mT.cov())
        self.mean, self.root = features.mean(0), (vectors * values.clamp(min=0).sqrt()) @ vectors.mT

    def _learn_classes(self, features: Tensor, labels: Tensor) -> None:
        """Where the classes stand: their means or, of fewer classes than features, points that lie to each other alike.

        These are the rows of the symmetric root of M M', M the means: fewer values, and the same distances.
        """
        members = F.one_hot(labels, len(self.class_names)).double()  # no sums in any order: a resumed run is exact
        counts = members.sum(0)
        if not counts.all():
            raise InputError(
                f"the {len(labels):,} real images of `fd_images` hold none of class "
                f"{self.class_names[counts.argmin()]}; give more, or leave classes out by `fd_labels` 0"
            )
        means = members.mT @ features / counts[:, None]
        if len(means) < means.shape[1]:
            values, vectors = torch.linalg.eigh(means @ means.mT)
            means = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
        self.classes = self.label_weight * means

    def distance(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Frechet distance to the real images, |m - m_r|^2 + tr(S) + tr(S_r) - 2 tr((S_r^1/2 S S_r^1/2)^1/2).

        The last trace is the sum of the roots of eigenvalues, whose gradient needs no distance between them.

        Shape: (D,), (D, D) float64 -> ().
        """
        both = self.root @ covariance @ self.root
        values = torch.linalg.eigvalsh((both + both.mT) / 2).clamp(min=0)
        overlap = (values + 1e-12 * values.detach().max()).sqrt().sum()  # the root of 0 has no gradient
        traces = covariance.trace() + self.root.square().sum()
        return (mean - self.mean).square().sum() + traces - 2 * overlap


class _OneStep(FlowObjective):
    """What both kinds share: the image is what one Euler step makes of noise, x_0 = noise - v(noise, t = 1).

    Args:
        fd_features, fd_decay, fd_images, fd_labels, fd_stages: Read by whoever makes the `judge`.
        options: Those of `Objective`.

    Attributes:
        kept: "judge", a `Judge` that has learnt, and "moments", the model's `RunningMoments`; to be set before the
            first loss.
    """

    def __init__(
        self, *, fd_features: str = "", fd_decay: float = 0.999, fd_images: int = 0, fd_labels: float = 0.0,
        fd_stages: str = "all", **options: Any
    ):
        super().__init__(**options)
        self.kept: dict[str, Any] = {}  # no parts of this module: they are the task's and the model's

    def draw_timesteps(self, generator: torch.Generator, batch_size: int) -> Tensor:
        return torch.full((batch_size,), float(self.num_train_timesteps), device=generator.device)

    def forward(self, denoiser: nn.Module, latents: Tensor, labels: Tensor, step: StepNoise) -> dict[str, Tensor]:
        predicted, _ = self.predict(denoiser, step.noise, labels, step)
        drawn = step.noise - self.scheduled(predicted, step.noise, 1.0)
        distance = self.kept["judge"].distance(*self.kept["moments"](self.kept["judge"](drawn, labels)))
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
