"""Training objectives of the denoiser; the only owner of label dropout.

The eps objective is that of improved DDPM (Nichol and Dhariwal, 2021) as DiT uses it: mean squared error of the noise,
plus the variational bound, in bits per dimension, for the variance alone (the mean is detached there).

The flow objective is that of SiT (Ma et al., 2024) with the linear path: x_t = (1 - t) x_0 + t noise, t uniform in
[0, 1], mean squared error of the velocity dx_t / dt = noise - x_0. The network may say x_0 or the noise instead of the
velocity (Back to Basics; Li and He, 2025).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from d_emo.errors import InputError


class StepNoise(NamedTuple):
    """All randomness of one step, for the whole global batch; a process takes the rows of its own images.

    Because it depends on (seed, step) alone, neither the number of processes nor accumulation changes it.
    """

    noise: torch.Tensor  # (B, C, *sizes)
    posterior_noise: torch.Tensor  # (B, C, *sizes), for the draw of latents from the VAE's posterior
    timesteps: torch.Tensor  # (B,) as the denoiser sees them: int64 for eps, float32 for flow
    drop_label: torch.Tensor  # (B,) bool
    flip: torch.Tensor  # (B,) bool


class Objective(nn.Module, ABC):
    """What the objectives share: the draw of a step's randomness, label dropout, the split of the output.

    Args:
        null_class: Class id that means "no class".
        label_dropout: Probability that a label becomes ``null_class``.
        learn_sigma: Whether the denoiser's output has a second half, for the variance.
        num_train_timesteps: The largest timestep that the denoiser sees, T.
        logit_normal: (mean, std) of the logit of t / T, as in Stable Diffusion 3 (Esser et al., 2024, section 3.1);
            None draws t uniformly, as DiT and SiT.
        time_shift: Factor s of t / T = s u / (1 + (s - 1) u), u the fraction drawn (Stable Diffusion 3, eq. 23).

    Attributes:
        whole_timesteps: Whether timesteps are whole numbers, places in a table.
    """

    whole_timesteps: ClassVar[bool] = False

    def __init__(
        self, *, null_class: int, label_dropout: float = 0.1, learn_sigma: bool = True,
        num_train_timesteps: int = 1000, logit_normal: tuple[float, float] | None = None,
        time_shift: float = 1.0,
    ):
        super().__init__()
        self.null_class, self.label_dropout, self.learn_sigma = null_class, label_dropout, learn_sigma
        self.num_train_timesteps, self.logit_normal, self.time_shift = num_train_timesteps, logit_normal, time_shift

    @abstractmethod
    def noise_schedule(self) -> Any:
        """The diffusers scheduler whose config tells sampling what the denoiser was trained for."""

    @abstractmethod
    def noised(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        """Latents at the noise level of the step's timesteps. Shape: (B, C, *sizes) -> same."""

    @abstractmethod
    def forward(
        self, denoiser: nn.Module, latents: torch.Tensor, labels: torch.Tensor, step: StepNoise
    ) -> dict[str, torch.Tensor]:
        """Loss of a batch: "loss", and under other names what is written down beside it.

        Shape: latents (B, C, *sizes), labels (B,) -> scalars
        """

    @classmethod
    def scheduled(cls, prediction: torch.Tensor, noisy: torch.Tensor, t: float) -> torch.Tensor:
        """What the schedulers of this objective take, of the network's prediction at the noise level t in [0, 1].

        Shape: prediction, noisy (B, C, *sizes) -> same
        """
        return prediction

    def draw(self, generator: torch.Generator, batch_size: int, latent_shape: tuple[int, ...]) -> StepNoise:
        """Draw one step's randomness on the generator's device."""
        device, shape = generator.device, (batch_size, *latent_shape)
        return StepNoise(
            noise=torch.randn(shape, generator=generator, device=device),
            posterior_noise=torch.randn(shape, generator=generator, device=device),
            timesteps=self.draw_timesteps(generator, batch_size),
            drop_label=torch.rand(batch_size, generator=generator, device=device) < self.label_dropout,
            flip=torch.rand(batch_size, generator=generator, device=device) < 0.5,
        )

    def draw_timesteps(self, generator: torch.Generator, batch_size: int) -> torch.Tensor:
        """Timesteps in [0, T). Shape: -> (B,), float32 or, with `whole_timesteps`, int64."""
        if self.logit_normal is None:
            fraction = torch.rand(batch_size, generator=generator, device=generator.device)
        else:
            mean, std = self.logit_normal
            fraction = torch.sigmoid(mean + std * torch.randn(batch_size, generator=generator, device=generator.device))
        if self.time_shift != 1:
            fraction = self.time_shift * fraction / (1 + (self.time_shift - 1) * fraction)
        t = fraction * self.num_train_timesteps
        return t.long().clamp(max=self.num_train_timesteps - 1) if self.whole_timesteps else t

    def predict(
        self, denoiser: nn.Module, noisy: torch.Tensor, labels: torch.Tensor, step: StepNoise
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The denoiser's prediction and, with learned sigma, its variance half; labels are dropped here.

        Shape: noisy (B, C, *sizes) -> same, twice
        """
        labels = torch.where(step.drop_label, self.null_class, labels)
        output = denoiser(noisy, timestep=step.timesteps, class_labels=labels).sample.float()
        return output.chunk(2, dim=1) if self.learn_sigma else (output, None)


class EpsObjective(Objective):
    """Noise prediction with a learned variance between the two bounds of DDPM ("learned range").

    Without learned sigma the loss is the error of the noise alone. The options are those of `Objective`.
    """

    whole_timesteps, betas = True, (1e-4, 0.02)  # the first and the last, linear between them

    def __init__(self, **options: Any):
        super().__init__(**options)
        betas = torch.linspace(*self.betas, self.num_train_timesteps, dtype=torch.float64)
        abar = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        posterior = betas * (1 - before) / (1 - abar)
        posterior[0] = posterior[1]  # beta-tilde is zero at t = 0, where its logarithm is needed all the same
        tables = {
            "sqrt_abar": abar.sqrt(), "sqrt_rest": (1 - abar).sqrt(),
            "log_beta": betas.log(), "log_posterior": posterior.log(),
            "from_x0": betas * before.sqrt() / (1 - abar),  # posterior mean, DDPM eq. 7
            "from_xt": (1 - before) * (1 - betas).sqrt() / (1 - abar),
        }  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def noise_schedule(self) -> DDPMScheduler:
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps, beta_start=self.betas[0], beta_end=self.betas[1],
            beta_schedule="linear", clip_sample=False, prediction_type="epsilon", timestep_spacing="linspace",
            variance_type="learned_range" if self.learn_sigma else "fixed_large",
        )

    def forward(self, denoiser: nn.Module, latents: torch.Tensor, labels: torch.Tensor, step: StepNoise) -> dict:
        noisy = self.noised(latents, step)
        predicted, variance = self.predict(denoiser, noisy, labels, step)
        mse = (predicted - step.noise).square().mean()
        if variance is None:
            return {"loss": mse, "mse": mse.detach()}
        vb = self._bound(latents, noisy, per_image(step.timesteps, latents), predicted.detach(), variance).mean()
        return {"loss": mse + vb, "mse": mse.detach(), "vb": vb.detach()}

    def noised(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        t = per_image(step.timesteps, latents)
        return self._at("sqrt_abar", t) * latents + self._at("sqrt_rest", t) * step.noise

    def _at(self, table: str, t: torch.Tensor) -> torch.Tensor:
        """A table's entry of each image. Shape: t (B, 1, ...) -> same."""
        return getattr(self, table)[t]

    def _bound(self, x0, xt, t, predicted, variance) -> torch.Tensor:
        """Term L_t of the variational bound in bits, per value. Shape: (B, C, *sizes).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) at t = 0 (DDPM eq. 5 and 13);
        the log variance is interpolated between log beta-tilde and log beta (improved DDPM eq. 15).
        """
        fraction = (variance + 1) / 2
        log_variance = fraction * self._at("log_beta", t) + (1 - fraction) * self._at("log_posterior", t)
        predicted_x0 = (xt - self._at("sqrt_rest", t) * predicted) / self._at("sqrt_abar", t)
        mean = self._at("from_x0", t) * predicted_x0 + self._at("from_xt", t) * xt
        true_mean = self._at("from_x0", t) * x0 + self._at("from_xt", t) * xt
        gap = self._at("log_posterior", t) - log_variance
        divergence = 0.5 * (gap.exp() - 1 - gap + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, -likelihood, divergence) / math.log(2)


class FlowObjective(Objective):
    """Velocity prediction on the straight path between data (t = 0) and noise (t = 1).

    The denoiser sees the timestep T t, a float in [0, T]: the unit of its sinusoidal features, and what diffusers'
    flow-matching schedulers hand out. (SiT's code feeds t itself.) A denoiser with learned sigma keeps its 2 C output
    channels, as SiT does: the first half is the velocity, the second is ignored and receives no gradient.

    Args:
        contrastive: Weight lambda of contrastive flow matching (Stoica et al., 2025): of the loss E |v - u|^2, u the
            velocity of the image's own path, lambda E |v - u'|^2 is taken away, u' that of the next image of the
            micro-batch.
        options: Those of `Objective`.

    Raises:
        InputError: In `forward`, contrastive with one image at once.
    """

    prediction_type: ClassVar[str | None] = None
    level = 0.05  # no noise level (flow-x) or rest of it (flow-eps) is divided by less, as in JiT

    def __init__(self, *, contrastive: float = 0.0, **options: Any):
        super().__init__(**options)
        self.contrastive = contrastive

    def noise_schedule(self) -> FlowMatchEulerDiscreteScheduler:
        schedule = FlowMatchEulerDiscreteScheduler(num_train_timesteps=self.num_train_timesteps, shift=self.time_shift)
        if self.prediction_type is not None:  # diffusers has no name for it, and means the velocity
            schedule.register_to_config(prediction_type=self.prediction_type)
        return schedule

    def forward(self, denoiser: nn.Module, latents: torch.Tensor, labels: torch.Tensor, step: StepNoise) -> dict:
        noisy, t = self.noised(latents, step), self._levels(latents, step)
        predicted, _ = self.predict(denoiser, noisy, labels, step)
        velocity = self.velocity(predicted, noisy, t)
        target = self.velocity(self.truth(latents, step), noisy, t)
        mse = (velocity - target).square().mean()
        if not self.contrastive:
            return {"loss": mse, "mse": mse.detach()}
        if len(latents) < 2:
            raise InputError("`contrastive` compares an image with the next one; give `micro_batch_size` 2 or more")
        other = (velocity - target.roll(1, 0)).square().mean()
        return {"loss": mse - self.contrastive * other, "mse": mse.detach(), "contrast": other.detach()}

    def noised(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        t = self._levels(latents, step)
        return (1 - t) * latents + t * step.noise

    def _levels(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        return per_image(step.timesteps / self.num_train_timesteps, latents)

    def truth(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        """What a perfect network would predict. Shape: (B, C, *sizes) -> same."""
        return step.noise - latents

    @classmethod
    def velocity(cls, prediction: torch.Tensor, noisy: torch.Tensor, t: Any) -> torch.Tensor:
        """The velocity that a prediction means at the noise level t. Shape: (B, C, *sizes), t () or (B, 1, ...)."""
        return prediction


class FlowSampleObjective(FlowObjective):
    """The flow objective of a network that predicts x_0 (x-prediction, v-loss: JiT; Li and He, 2025, section 4).

    The velocity is (x_t - x_0) / t, prediction and truth alike, and t is at least 0.05 there. When sampling, t is what
    it is: the last Euler step then ends in x_0 itself.
    """

    prediction_type = "flow_sample"

    def truth(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        return latents

    @classmethod
    def velocity(cls, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (noisy - prediction) / t.clamp(min=cls.level)

    @classmethod
    def scheduled(cls, prediction: torch.Tensor, noisy: torch.Tensor, t: float) -> torch.Tensor:
        return (noisy - prediction) / max(t, 1e-4)


class FlowNoiseObjective(FlowObjective):
    """The flow objective of a network that predicts the noise (eps-prediction, v-loss: Li and He, 2025, table 1).

    The velocity is (noise - x_t) / (1 - t), prediction and truth alike, and 1 - t is at least 0.05.
    """

    prediction_type = "flow_epsilon"

    def truth(self, latents: torch.Tensor, step: StepNoise) -> torch.Tensor:
        return step.noise

    @classmethod
    def velocity(cls, prediction: torch.Tensor, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (prediction - noisy) / (1 - t).clamp(min=cls.level)

    @classmethod
    def scheduled(cls, prediction: torch.Tensor, noisy: torch.Tensor, t: float) -> torch.Tensor:
        return (prediction - noisy) / max(1 - t, cls.level)


def per_image(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """One value per image, to be multiplied with latents. Shape: (B,), (B, ...) -> (B, 1, ...)."""
    return values.view(-1, *[1] * (latents.ndim - 1))


def discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-probability of the 1/127.5-wide bin around x under a Gaussian; end bins reach to infinity (DDPM eq. 13).

    Shape: as ``x``, which the others broadcast to.
    """
    inverse_std = (-log_std).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()
