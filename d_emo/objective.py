"""Training objective of the denoiser; the only owner of label dropout.

The eps objective is that of improved DDPM (Nichol and Dhariwal, 2021) as DiT uses it: mean squared error of the noise,
plus the variational bound, in bits per dimension, for the variance alone (the mean is detached there).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn


class Draws(NamedTuple):
    """All randomness of one step, for the whole global batch; a process slices its share out of it.

    Because it depends on (seed, step) alone, neither the number of processes nor accumulation changes it.
    """

    noise: torch.Tensor  # (B, C, H, W)
    posterior_noise: torch.Tensor  # (B, C, H, W), for the draw of latents from the VAE's posterior
    timesteps: torch.Tensor  # (B,) int64
    drop_label: torch.Tensor  # (B,) bool
    flip: torch.Tensor  # (B,) bool

    def __getitem__(self, rows: slice) -> Draws:  # type: ignore[override]
        return Draws(*(field[rows] for field in self._asdict().values()))


class EpsObjective(nn.Module):
    """Noise prediction with a learned variance between the two bounds of DDPM ("learned range").

    Args:
        num_train_timesteps: Diffusion steps T.
        beta_start: First beta of the linear schedule.
        beta_end: Last beta.
        label_dropout: Probability that a label becomes ``null_class``.
        null_class: Class id that means "no class".
        learn_sigma: Whether the denoiser also predicts the variance; without it the loss is the error alone.
    """

    def __init__(
        self, *, null_class: int, label_dropout: float = 0.1, learn_sigma: bool = True,
        num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
    ):
        super().__init__()
        self.null_class, self.label_dropout, self.learn_sigma = null_class, label_dropout, learn_sigma
        self.num_train_timesteps = num_train_timesteps
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        abar = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        posterior = betas * (1 - before) / (1 - abar)
        posterior[0] = posterior[1]  # beta-tilde is zero at t = 0, where its logarithm is needed all the same
        tables = {
            "sqrt_abar": abar.sqrt(),
            "sqrt_rest": (1 - abar).sqrt(),
            "log_beta": betas.log(),
            "log_posterior": posterior.log(),
            "from_x0": betas * before.sqrt() / (1 - abar),  # posterior mean, DDPM eq. 7
            "from_xt": (1 - before) * (1 - betas).sqrt() / (1 - abar),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    def draw(self, generator: torch.Generator, batch_size: int, latent_shape: tuple[int, ...]) -> Draws:
        """Draw one step's randomness on the generator's device."""
        device, shape = generator.device, (batch_size, *latent_shape)
        return Draws(
            noise=torch.randn(shape, generator=generator, device=device),
            posterior_noise=torch.randn(shape, generator=generator, device=device),
            timesteps=torch.randint(self.num_train_timesteps, (batch_size,), generator=generator, device=device),
            drop_label=torch.rand(batch_size, generator=generator, device=device) < self.label_dropout,
            flip=torch.rand(batch_size, generator=generator, device=device) < 0.5,
        )

    def forward(self, denoiser: nn.Module, latents: torch.Tensor, labels: torch.Tensor, draws: Draws) -> dict:
        """Loss of a batch.

        Shape: latents (B, C, H, W), labels (B,) -> scalars "loss", "mse" and, with a learned variance, "vb".
        """
        t, noise = draws.timesteps, draws.noise
        noisy = self._at("sqrt_abar", t) * latents + self._at("sqrt_rest", t) * noise
        labels = torch.where(draws.drop_label, self.null_class, labels)
        output = denoiser(noisy, timestep=t, class_labels=labels).sample.float()
        if not self.learn_sigma:
            mse = (output - noise).square().mean()
            return {"loss": mse, "mse": mse.detach()}
        predicted, variance = output.chunk(2, dim=1)
        mse = (predicted - noise).square().mean()
        vb = self._bound(latents, noisy, t, predicted.detach(), variance).mean()
        return {"loss": mse + vb, "mse": mse.detach(), "vb": vb.detach()}

    def _at(self, table: str, t: torch.Tensor) -> torch.Tensor:
        return getattr(self, table)[t][:, None, None, None]

    def _bound(self, x0, xt, t, predicted, variance) -> torch.Tensor:
        """Term L_t of the variational bound in bits, per value. Shape: (B, C, H, W).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) at t = 0 (DDPM eq. 5 and 13);
        the log variance is interpolated between log beta-tilde and log beta (improved DDPM eq. 15).
        """
        share = (variance + 1) / 2
        log_variance = share * self._at("log_beta", t) + (1 - share) * self._at("log_posterior", t)
        predicted_x0 = (xt - self._at("sqrt_rest", t) * predicted) / self._at("sqrt_abar", t)
        mean = self._at("from_x0", t) * predicted_x0 + self._at("from_xt", t) * xt
        true_mean = self._at("from_x0", t) * x0 + self._at("from_xt", t) * xt
        gap = self._at("log_posterior", t) - log_variance
        divergence = 0.5 * (gap.exp() - 1 - gap + (true_mean - mean).square() * (-log_variance).exp())
        likelihood = discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where((t == 0)[:, None, None, None], -likelihood, divergence) / math.log(2)


def discretised_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Log-probability of the 1/127.5-wide bin around x under a Gaussian; end bins reach to infinity (DDPM eq. 13)."""
    inverse_std = (-log_std).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inverse_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inverse_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp_min(1e-12).log()
