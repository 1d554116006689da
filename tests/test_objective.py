import math

import pytest
import torch

from d_emo.data import rows_of
from d_emo.errors import InputError
from d_emo.objective import EpsObjective, FlowObjective, discretised_log_likelihood
from d_emo.tables import objective_of
from d_emo.training.classifier import Augmentation


class Fixed(torch.nn.Module):
    """A denoiser whose output is given."""

    def __init__(self, output):
        super().__init__()
        self.output, self.labels = torch.nn.Parameter(output), None

    def forward(self, x, timestep, class_labels):
        self.seen, self.timestep, self.labels = x, timestep, class_labels
        return type("Output", (), {"sample": self.output})


def plain_bound(x0, xt, t, eps, v):
    """L_t of the variational bound for one value, in bits, from the densities themselves, in Python floats."""
    betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    abar = 1.0
    for beta in betas[: t + 1]:
        before, abar = abar, abar * (1 - beta)
    beta = betas[t]
    tilde = beta * (1 - before) / (1 - abar)
    floor = tilde if t else betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))
    variance = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(floor))
    x0_hat = (xt - math.sqrt(1 - abar) * eps) / math.sqrt(abar)

    def posterior_mean(start):
        return math.sqrt(before) * beta / (1 - abar) * start + math.sqrt(1 - beta) * (1 - before) / (1 - abar) * xt

    mean = posterior_mean(x0_hat)
    if t == 0:
        def cdf(z):
            return 0.5 * (1 + math.erf((z - mean) / math.sqrt(2 * variance)))
        upper = 1.0 if x0 > 0.999 else cdf(x0 + 1 / 255)
        lower = 0.0 if x0 < -0.999 else cdf(x0 - 1 / 255)
        return -math.log(max(upper - lower, 1e-12)) / math.log(2)
    gap = posterior_mean(x0) - mean
    return 0.5 * (math.log(variance / tilde) + (tilde + gap**2) / variance - 1) / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 2, 50, 500, 999])
def test_eps_objective_is_mse_plus_the_variational_bound(t):
    generator = torch.Generator().manual_seed(t)
    objective = EpsObjective(null_class=10).double()
    for name, table in objective.named_buffers():
        assert table.shape == (1000,), name
    latents = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64) * 0.6
    draws = objective.draw(generator, 2, (3, 2, 2))
    draws = draws._replace(timesteps=torch.full((2,), t), noise=draws.noise.double())
    output = torch.randn(2, 6, 2, 2, generator=generator, dtype=torch.float64) * 0.5
    # close to the truth, or the last steps' likelihood only tests its floor
    output[:, :3] = draws.noise + 0.02 * output[:, :3]
    losses = objective(Fixed(output), latents, torch.tensor([1, 2]), draws)
    output = output.float().double()
    mse = (output[:, :3] - draws.noise).square().mean().item()
    abar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1))
    noisy = math.sqrt(abar) * latents + math.sqrt(1 - abar) * draws.noise
    columns = zip(*(x.flatten().tolist() for x in (latents, noisy, output[:, :3], output[:, 3:])), strict=True)
    bound = sum(plain_bound(x0, xt, t, eps, v) for x0, xt, eps, v in columns) / latents.numel()
    assert losses["mse"].item() == pytest.approx(mse, rel=1e-5)
    assert losses["vb"].item() == pytest.approx(bound, rel=2e-3, abs=1e-6)
    assert losses["loss"].item() == pytest.approx(mse + bound, rel=2e-3)


def test_the_bound_does_not_train_the_mean():
    objective = EpsObjective(null_class=10)
    draws = objective.draw(torch.Generator().manual_seed(0), 4, (3, 2, 2))
    model = Fixed(torch.randn(4, 6, 2, 2))
    objective(model, torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.long), draws)["loss"].backward()
    of_mse_alone = 2 * (model.output[:, :3] - draws.noise) / draws.noise.numel()
    assert torch.allclose(model.output.grad[:, :3], of_mse_alone, atol=1e-6)
    assert model.output.grad[:, 3:].abs().min() > 0


def test_labels_are_dropped_to_the_null_class_at_the_rate_asked_for():
    objective = EpsObjective(null_class=10, label_dropout=0.25)
    draws = objective.draw(torch.Generator().manual_seed(0), 8000, (1, 1, 1))
    model = Fixed(torch.zeros(8000, 2, 1, 1))
    objective(model, torch.zeros(8000, 1, 1, 1), torch.full((8000,), 4), draws)
    assert set(model.labels.tolist()) == {4, 10}
    assert (model.labels == 10).float().mean().item() == pytest.approx(0.25, abs=0.02)
    seen = set(draws.timesteps.tolist())
    assert (min(seen), max(seen)) == (0, 999) and len(seen) > 990


def test_a_share_of_the_draws_has_its_rows_of_all_their_parts():
    draws = EpsObjective(null_class=1).draw(torch.Generator().manual_seed(0), 6, (2, 3, 3))
    part = rows_of(draws, slice(2, 4))
    assert [len(field) for field in (part.noise, part.timesteps, part.flip)] == [2, 2, 2]
    assert torch.equal(part.noise, draws.noise[2:4]) and torch.equal(part.drop_label, draws.drop_label[2:4])
    drawn = Augmentation(flip=draws.flip, shift=draws.noise)  # some have parts that are not drawn
    part = rows_of(drawn, slice(2, 4))
    assert type(part) is Augmentation and part.noise is None and torch.equal(part.flip, drawn.flip[2:4])
    chosen = torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.bool)
    assert torch.equal(rows_of(draws.noise, slice(2, 4)), draws.noise[2:4])
    assert torch.equal(rows_of(draws, chosen).noise, draws.noise[2:4])


def test_draws_of_a_kind_whose_rows_cannot_be_taken_are_refused():
    class Own:
        def __getitem__(self, rows):
            return self

    with pytest.raises(InputError, match="draws tensors or None, .* not Own; a NamedTuple"):
        rows_of((torch.zeros(6, 2), Own()), slice(2, 4))


def test_discretised_likelihood_sums_to_one_over_all_bins():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_p = discretised_log_likelihood(bins, torch.tensor(0.3).double(), torch.tensor(-1.0).double())
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("kind", [EpsObjective, FlowObjective])
def test_timesteps_are_uniform_or_logit_normal(kind):
    generator = torch.Generator().manual_seed(0)
    t = kind(null_class=1).draw_timesteps(generator, 20_000).double()
    tenths = [t.quantile(share).item() for share in (0.1, 0.5, 0.9)]
    assert tenths == pytest.approx([100, 500, 900], abs=15)
    t = kind(null_class=1, logit_normal=(-1.2, 0.8)).draw_timesteps(generator, 20_000)
    assert 0 <= t.min() and t.max() <= 999.999 and t.dtype == (torch.int64 if kind is EpsObjective else torch.float32)
    logits = torch.logit((t.double() + 0.5 * (kind is EpsObjective)) / 1000)
    assert logits.mean().item() == pytest.approx(-1.2, abs=0.03) and logits.std().item() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_flow_objective_is_the_squared_error_of_the_velocity(learn_sigma):
    generator = torch.Generator().manual_seed(0)
    objective = FlowObjective(null_class=10, learn_sigma=learn_sigma, label_dropout=0.5)
    draws = objective.draw(generator, 4, (3, 2, 2))
    latents = torch.randn(4, 3, 2, 2, generator=generator)
    model = Fixed(torch.randn(4, 6 if learn_sigma else 3, 2, 2, generator=generator))
    losses = objective(model, latents, torch.tensor([1, 2, 3, 4]), draws)
    total = 0.0
    for i in range(4):
        t = draws.timesteps[i].item() / 1000
        for at in ((c, y, x) for c in range(3) for y in range(2) for x in range(2)):
            x0, noise = latents[i][at].item(), draws.noise[i][at].item()
            assert model.seen[i][at].item() == pytest.approx((1 - t) * x0 + t * noise, abs=1e-6)
            total += (model.output[i][at].item() - (noise - x0)) ** 2
    assert losses["loss"].item() == losses["mse"].item() == pytest.approx(total / 48, rel=1e-5)
    assert torch.equal(model.timestep, draws.timesteps)
    kept = [label for label, dropped in zip([1, 2, 3, 4], draws.drop_label.tolist(), strict=True) if not dropped]
    assert 0 < len(kept) < 4 and [label for label in model.labels.tolist() if label != 10] == kept
    losses["loss"].backward()
    assert model.output.grad[:, :3].abs().min() > 0
    assert not learn_sigma or not model.output.grad[:, 3:].any()


def test_flow_timesteps_fill_the_path_evenly():
    t = FlowObjective(null_class=1).draw(torch.Generator().manual_seed(0), 8000, (1, 1, 1)).timesteps
    assert t.dtype == torch.float32 and t.unique().numel() > 7900
    shares = torch.histc(t, bins=10, min=0, max=1000) / 8000
    assert shares.sum() == 1 and (shares - 0.1).abs().max() < 0.015


def test_noise_schedules_name_their_objective():
    for name, kind in (("eps", EpsObjective), ("flow", FlowObjective)):
        assert objective_of(kind(null_class=1).noise_schedule().config) == name
    assert EpsObjective(null_class=1).noise_schedule().config.variance_type == "learned_range"
    assert EpsObjective(null_class=1, learn_sigma=False).noise_schedule().config.variance_type == "fixed_large"
    with pytest.raises(InputError, match="v_prediction"):
        objective_of({"prediction_type": "v_prediction"})


def test_the_noise_schedule_is_the_objectives():
    objective = EpsObjective(null_class=1)
    alphas = objective.noise_schedule().alphas_cumprod
    torch.testing.assert_close(alphas.sqrt(), objective.sqrt_abar, rtol=1e-5, atol=1e-7)
    flow = FlowObjective(null_class=1).noise_schedule()
    torch.testing.assert_close(flow.timesteps, flow.sigmas * 1000)
