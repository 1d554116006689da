"""Generation in one step or four: a flow network goes on being trained by the Frechet distance of features.

Source: FD-loss (Yang et al., 2026): the distance of published tables as a loss, over running statistics of what the
network draws, so that a batch may be small. No teacher, no adversary, no derivative along the path. Four steps are
ours: the same loss for each, on what the steps before it drew.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d_emo.data import rows_of
from d_emo.errors import InputError
from d_emo.objective import FlowObjective, FlowSampleObjective, StepNoise, per_image

CLASS_AXES = 64
"""Of class means that stand beside the features: a distance costs the cube of their number together."""


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

    The classifier is one of images, to which latents are decoded, or, without a codec, one of the latents themselves.

    Features are taken from the mean over real images, which changes no distance and keeps the moments exact.

    Args:
        network: An EMO classifier or one of timm's, with timm's ``forward_features`` and ``forward_head``, or, of
            ``stages``, ``forward_intermediates``.
        codec: Its ``decoded`` passes gradients; None for a classifier of latents.
        side: Of the classifier's images, or to which latents are enlarged.
        class_names: Of the data.
        noise: The largest share of noise that is mixed into drawn and real images alike before they are looked at,
            (1 - t) x + t noise, t uniform in [0, noise]; what the classifier was trained with.
        stages: Take the means over positions of the last four stages, each divided by its deviation over real images;
            otherwise the pooled features before the head, as they are.
        label_weight: Factor of the class means that stand beside the features (`joint`); 0 leaves them out.
        class_rows: Which class of the network each of the data is; None: the same.
    """

    def __init__(
        self, network: nn.Module, codec: Any, side: int, *, class_names: Sequence[str] = ("",), noise: float = 0.0,
        stages: bool = False, label_weight: float = 0.0, class_rows: Sequence[int] | None = None
    ):
        super().__init__()
        self.network, self.codec, self.side = network.eval().requires_grad_(False), codec, side
        self.class_names, self.noise, self.stages, self.label_weight = class_names, noise, stages, label_weight
        self.mean = self.root = self.centre = self.scale = self.classes = None
        self.class_rows = None if class_rows is None else list(class_rows)

    def features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features of images in [-1, 1], or of latents, as the network gives them. Shape: (B, C, H, W) -> (B, D)."""
        return self._looked(images, generator)[0]

    def _looked(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The features, and the last map, from which the head comes to its classes."""
        if self.codec is not None:  # latents are enlarged with their noise, as `train-classifier` does it
            images = self._resized(images)
        if self.noise:  # without a generator the loop's, which it seeds by the step
            drawn: dict[str, Any] = {"generator": generator, "device": images.device}
            t = self.noise * torch.rand(len(images), 1, 1, 1, **drawn)
            images = (1 - t) * images + t * torch.randn(images.shape, **drawn)
        images = self._resized(images)
        if self.stages:
            last, maps = self.network.forward_intermediates(images, indices=4, norm=True)
            return torch.cat([each.float().mean((2, 3)) for each in maps], dim=1), last
        last = self.network.forward_features(images)
        return self.network.forward_head(last, pre_logits=True).float(), last

    def _resized(self, images: Tensor) -> Tensor:
        if images.shape[2:] == (self.side, self.side):
            return images
        return F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=True)

    def width(self, dim: int) -> int:
        """How many values `joint` gives, of features of so many."""
        return dim + bool(self.label_weight) * min(dim, len(self.class_names), CLASS_AXES)

    def joint(self, features: Tensor, labels: Tensor) -> Tensor:
        """Centred features, and beside them the mean features of the class's real images, times ``label_weight``.

        The distance of both together is the Frechet joint distance (DeVries et al., 2019), in which a drawing must be
        what it was asked for. `learn` comes first.

        Shape: (B, D), (B,) -> (B, D + min(D, classes, `CLASS_AXES`)), or (B, D) where classes have no weight.
        """
        features = (features - self.centre.to(features)) / self.scale.to(features)
        return torch.cat([features, self.classes[labels].to(features)], dim=1) if self.label_weight else features

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """What `joint` gives of latents, decoded where need be. Shape: (B, C, h, w), (B,) -> (B, `width`)."""
        return self.joint(self.features(self._seen(latents)), labels)

    def with_logits(self, latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and what the network's head says of the same view. Shape: -> (B, `width`), (B, classes)."""
        features, last = self._looked(self._seen(latents))
        logits = self.network.forward_head(last).float()
        return self.joint(features, labels), logits if self.class_rows is None else logits[:, self.class_rows]

    def _seen(self, latents: Tensor) -> Tensor:
        return latents if self.codec is None else self.codec.decoded(latents)

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

        These are the rows of the symmetric root of M M', M the means: fewer values, and the same distances. Of many
        classes it is the means along their `CLASS_AXES` leading principal axes.
        """
        members = F.one_hot(labels, len(self.class_names)).double()  # no sums in any order: a resumed run is exact
        counts = members.sum(0)
        if not counts.all():
            raise InputError(
                f"the {len(labels):,} real images of `fd_images` hold none of class "
                f"{self.class_names[counts.argmin()]}; give more, or leave classes out by `fd_labels` 0"
            )
        means = members.mT @ features / counts[:, None]
        if min(means.shape) > CLASS_AXES:
            axes = torch.linalg.eigh(means.mT @ means)[1][:, -CLASS_AXES:]
            largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # an axis has two directions; one is chosen
            means = means @ (axes * largest.sign())
        elif len(means) < means.shape[1]:
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


class OneStepObjective(FlowObjective):
    """One step of a network that predicts the velocity: x_0 = noise - v(noise, t = 1), an Euler step over the path.

    Two more terms may stand beside the distance: the cross-entropy by which the judge's classifier takes a drawing for
    what was asked for, as in AC-GAN (Odena et al., 2017), and the loss of flow on as many real images as each step has
    drawings.

    Args:
        fd_features, fd_decay, fd_images, fd_labels, fd_stages: Read by whoever makes the `judge`.
        class_weight: Of the cross-entropy.
        flow_weight: Of the loss of flow.
        options: Those of `Objective`.

    Attributes:
        steps: In which an image is drawn, from the noise levels 1, 1 - 1 / steps, ..., 1 / steps. Before every step but
            the first, what the one before it drew is mixed with new noise: x_t = (1 - t) x_0 + t noise.
        kept: "judge", a `Judge` that has learnt, "moments", the model's `RunningMoments`, one for each step, and
            "average", called like the denoiser, which draws the steps before the one that is trained; to be set before
            the first loss.

    Raises:
        InputError: In `forward`, images of which there are no equal shares.
    """

    prediction_type = "flow_one_step"
    steps: ClassVar[int] = 1

    def __init__(
        self, *, fd_features: str = "", fd_decay: float = 0.999, fd_images: int = 0, fd_labels: float = 0.0,
        fd_stages: str = "all", class_weight: float = 0.0, flow_weight: float = 0.0, **options: Any
    ):
        super().__init__(**options)
        self.class_weight, self.flow_weight = class_weight, flow_weight
        self.kept: dict[str, Any] = {}  # no parts of this module: they are the task's and the model's

    @property
    def shares(self) -> int:
        """How many a micro-batch has: one for each step, and one of real images for the loss of flow."""
        return self.steps + bool(self.flow_weight)

    def draw_timesteps(self, generator: torch.Generator, batch_size: int) -> Tensor:
        """Of the shares in turns, so that each micro-batch has all of them. Shape: -> (B,) float32."""
        share = torch.arange(batch_size, device=generator.device) % self.shares
        levels = self.num_train_timesteps * (1 - share / self.steps)
        if not self.flow_weight:
            return levels
        return torch.where(share < self.steps, levels, super().draw_timesteps(generator, batch_size))

    def forward(self, denoiser: nn.Module, latents: Tensor, labels: Tensor, step: StepNoise) -> dict[str, Tensor]:
        if len(labels) % self.shares:
            raise InputError(f"{len(labels)} images have no equal shares for {self.shares} parts of the loss")
        share, judge = torch.arange(len(labels), device=labels.device) % self.shares, self.kept["judge"]
        drawn = share < self.steps
        noisy = self._drawn_before(step, labels, share)
        if self.flow_weight:
            noisy = torch.where(per_image(drawn, noisy), noisy, self.noised(latents, step))
        t = self._levels(noisy, step)
        velocity = self.velocity(self.predict(denoiser, noisy, labels, step)[0], noisy, t)
        images, asked = (noisy - t * velocity)[drawn], labels[drawn]
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.class_weight:
            features, logits = judge.with_logits(images, asked)
            terms["cross_entropy"] = self.class_weight, F.cross_entropy(logits, asked)
        else:
            features = judge(images, asked)
        distances = torch.stack([
            judge.distance(*moments(features[share[drawn] == number]))
            for number, moments in enumerate(self.kept["moments"])
        ])  # fmt: skip
        if self.flow_weight:
            gap = velocity - self.velocity(self.truth(latents, step), noisy, t)
            terms["mse"] = self.flow_weight, gap[~drawn].square().mean()
        distance = distances.mean().float()
        loss = distance + sum(weight * term for weight, term in terms.values())
        each = {f"fd_{number}": one for number, one in enumerate(distances.float(), start=1)} if self.steps > 1 else {}
        written = {"fd": distance, **each, **{name: term for name, (_, term) in terms.items()}}
        return {"loss": loss, **{name: value.detach() for name, value in written.items()}}

    @torch.no_grad()
    def _drawn_before(self, step: StepNoise, labels: Tensor, share: Tensor) -> Tensor:
        """What each step starts from: the average draws those before it. Shape: share (B,) -> (B, C, *sizes)."""
        noisy = step.noise.clone()
        for done in range(self.steps - 1):
            rows = (share > done) & (share < self.steps)
            now = self._at_level(rows_of(step, rows), done)
            drawn = self._clean(self.kept["average"], noisy[rows], labels[rows], now)
            new = now._replace(noise=torch.randn_like(drawn))  # by the loop's generator, which it seeds by the step
            noisy[rows] = self.noised(drawn, self._at_level(new, done + 1))
        return noisy

    def _at_level(self, step: StepNoise, number: int) -> StepNoise:
        level = self.num_train_timesteps * (1 - number / self.steps)
        return step._replace(timesteps=torch.full_like(step.timesteps, level))

    def _clean(self, denoiser: Any, noisy: Tensor, labels: Tensor, step: StepNoise) -> Tensor:
        """The x_0 that a prediction means. Shape: (B, C, *sizes) -> same."""
        t = self._levels(noisy, step)
        return noisy - t * self.velocity(self.predict(denoiser, noisy, labels, step)[0], noisy, t)


class OneStepSampleObjective(OneStepObjective, FlowSampleObjective):
    """One step of a network that predicts x_0."""

    prediction_type = "flow_one_step_sample"


class FourStepObjective(OneStepObjective):
    """Four steps of a network that predicts the velocity."""

    prediction_type, steps = "flow_four_step", 4


class FourStepSampleObjective(FourStepObjective, FlowSampleObjective):
    """Four steps of a network that predicts x_0."""

    prediction_type = "flow_four_step_sample"


def check_one_process(world_size: int) -> None:
    """Refuse several processes, whose running statistics would differ.

    Raises:
        InputError: There are several.
    """
    if world_size > 1:
        raise InputError(
            "the Frechet distance of features keeps its statistics in one process; start one, with a larger batch"
        )
