"""One-step generation by the Frechet distance of features."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_resume import last_state, same

from d_emo.cli import run_verb
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.evaluation.statistics import frechet_distance
from d_emo.frechet import Judge, OneStepObjective, OneStepSampleObjective, RunningMoments, check_one_process
from d_emo.io.snapshot import load_denoiser
from d_emo.objective import StepNoise
from d_emo.sampling import Guidance, Sampler
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask

OLD = Path(__file__).parent / "data" / "artefacts"
ONE_STEP = {
    "init_from": str(OLD / "flow"), "objective": "one-step", "fd_features": f"emov2:{OLD / 'classifier'}",
    "dataset": "digits", "batch_size": 8, "max_steps": 6, "state_every": 3, "snapshot_every": 6, "learning_rate": 1e-3,
    "ema_decay": 0.9, "tracker": "none", "fd_images": 100,
}


def moments(seed, dim=5):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(40, dim, generator=generator, dtype=torch.float64) @ torch.randn(
        dim, dim, generator=generator, dtype=torch.float64) + seed
    return features.mean(0), features.mT.cov()


def test_the_loss_is_the_frechet_distance_of_the_tables_and_its_gradient_is_right():
    judge = Judge(torch.nn.Identity(), None, 8)
    (mean, covariance), (real_mean, real_covariance) = moments(1), moments(2)
    judge.learn(real_mean, real_covariance)
    distance = judge.distance(mean, covariance).item()
    assert distance == pytest.approx(frechet_distance(mean, covariance, real_mean, real_covariance), rel=1e-4)
    features = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: judge.distance(f.mean(0), f.mT.cov()), features, atol=1e-4)


def test_running_moments_are_a_mean_first_and_then_decay():
    """m = b m + (1 - b) mean(f), b = min(decay, n / (n + 1)); only the batch has a gradient."""
    running, batches = RunningMoments(3, 0.6), torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    mean, second = np.zeros(3), np.zeros((3, 3))
    for n, batch in enumerate(batches):
        features = batch.clone().requires_grad_()
        b, f = min(0.6, n / (n + 1)), batch.double().numpy()
        mean, second = b * mean + (1 - b) * f.mean(0), b * second + (1 - b) * f.T @ f / 4
        given = running(features)
        np.testing.assert_allclose(given[0].detach(), mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(given[1].detach(), second - np.outer(mean, mean), rtol=1e-3, atol=1e-5)
        given[0].sum().backward()
        torch.testing.assert_close(features.grad, torch.full((4, 3), (1 - b) / 4), rtol=1e-5, atol=1e-7)
    running(torch.full((4, 3), float("nan")))
    assert running.mean.isfinite().all() and running.batches == 5


@pytest.mark.parametrize("kind", [OneStepObjective, OneStepSampleObjective])
def test_what_is_trained_is_what_is_drawn(kind, tiny_denoiser):
    objective, seen = kind(null_class=10), []

    class Seen:
        def __call__(self, latents):
            seen.append(latents)
            return latents.flatten(1)

        def distance(self, mean, covariance):
            return mean.sum()

    objective.kept = {"judge": Seen(), "moments": lambda features: (features.mean(0), None)}
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = objective.draw(torch.Generator().manual_seed(1), 2, (4, 8, 8))
    draws = StepNoise(noise, draws.posterior_noise, draws.timesteps, torch.zeros(2, dtype=torch.bool), draws.flip)
    assert draws.timesteps.tolist() == [1000.0, 1000.0]
    objective(tiny_denoiser, noise * 0, torch.tensor([3, 4]), draws)["loss"].backward()
    assert tiny_denoiser.final_layer.linear.weight.grad.abs().max() > 0
    sampler = Sampler(tiny_denoiser, None, objective.noise_schedule().config, guidance=1.0)
    assert sampler.steps == 1 and sampler._objective == {OneStepObjective: "one-step"}.get(kind, "one-step-x")
    from d_emo.sampling import denoise

    sampler.scheduler.set_timesteps(sigmas=[1.0])
    last = list(denoise(tiny_denoiser, sampler.scheduler, noise, torch.tensor([3, 4]), guidance=Guidance(1.0)))[-1]
    torch.testing.assert_close(last.latents, seen[0].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "drawn"), [
    (OneStepObjective, lambda noise, v: noise - v), (OneStepSampleObjective, lambda noise, x: x),
])  # fmt: skip
def test_the_objective_is_the_papers_loss_over_what_was_drawn_so_far(kind, drawn):
    """Yang et al., 2026: x = G(z, c), f its features; d = |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^1/2), in NumPy.

    G is one Euler step from t = 1, where the network sees the timestep 1000; b = min(0.9, n / (n + 1)).
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    (real_mean, real_covariance), judge = moments(3, 3), Judge(torch.nn.Identity(), None, 8)
    judge.learn(real_mean, real_covariance)
    judge.forward = lambda latents: (latents.flatten(1).double() @ weights).square()
    objective = kind(null_class=9, label_dropout=0.0, learn_sigma=False, fd_decay=0.6)
    objective.kept = {"judge": judge, "moments": RunningMoments(3, 0.6)}
    asked = []

    def network(x, timestep, class_labels):
        asked.extend(zip(timestep.tolist(), class_labels.tolist(), strict=True))
        return type("Output", (), {"sample": torch.sin(3 * x) + class_labels.view(-1, 1, 1, 1)})

    mean, second = np.zeros(3), np.zeros((3, 3))
    for n in range(4):
        draws, labels = objective.draw(generator, 5, (3, 2, 2)), torch.tensor([0, 1, 2, 1, 0])
        losses = objective(network, torch.full((5, 3, 2, 2), float("nan")), labels, draws)
        said = np.sin(3 * draws.noise.double().numpy()) + labels.view(-1, 1, 1, 1).numpy()
        f = (drawn(draws.noise.double().numpy(), said).reshape(5, 12) @ weights.numpy()) ** 2
        b = min(0.6, n / (n + 1))
        mean, second = b * mean + (1 - b) * f.mean(0), b * second + (1 - b) * f.T @ f / 5
        covariance = second - np.outer(mean, mean)
        root = scipy.linalg.sqrtm(covariance @ real_covariance.numpy()).real
        wanted = ((mean - real_mean.numpy()) ** 2).sum() + np.trace(covariance + real_covariance.numpy() - 2 * root)
        assert losses["loss"].item() == losses["fd"].item() == pytest.approx(wanted, rel=1e-3)
    assert asked == [(1000.0, label) for _ in range(4) for label in (0, 1, 2, 1, 0)]


def run(folder, **changes):
    AcceleratorState._reset_state(True)
    settings = TrainSettings(**{**ONE_STEP, "output_dir": str(folder), **changes})
    task = DenoiserTask(settings)
    return task, fit(task, settings)


def test_a_run_ends_in_a_snapshot_that_draws_in_one_step_and_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, snapshot = run(tmp_path / "whole")
    run(tmp_path / "parts", max_steps=3)
    shutil.rmtree(tmp_path / "parts" / "snapshots")
    run(tmp_path / "parts")
    assert same(last_state(tmp_path / "parts", 6), last_state(tmp_path / "whole", 6))
    assert task.model.moments.batches == 6
    assert not any(name.startswith("moments") for name in load_file(next(snapshot.glob("transformer/*.safetensors"))))
    opened = load_denoiser(snapshot)
    assert (opened.objective, opened.label_dropout) == ("one-step", 0.0)
    run_verb("sample", ["--checkpoint", str(snapshot), "--class", "3", "--num-images", "2", "--output", "x.png"])
    with pytest.raises(InputError, match="--steps|images of the one-step objective take 1 step, not 30"):
        run_verb("sample", ["--checkpoint", str(snapshot), "--class", "3", "--steps", "30", "--output", "y.png"])
    with pytest.raises(InputError, match="`guidance_scale` 2 needs a null class"):
        Sampler.open(snapshot, guidance=2.0)


@pytest.mark.parametrize(("changes", "words"), [
    ({"init_from": None, "image_size": 32, "vae": "pixels"}, "goes on from a snapshot of flow, not of none; name one"),
    ({"objective": "one-step-x"}, "goes on from a snapshot of flow-x, not of flow"),
    ({"fd_features": None}, "`objective` one-step needs `fd_features` emov2:SNAPSHOT"),
    ({"fd_features": "inception"}, "`fd_features` inception passes no gradients"),
    ({"cache_latents": True}, "looks at whole images and at nothing else; leave `cache_latents` out"),
    ({"objective": "flow"}, "`fd_features` .* belongs to `objective` one-step, one-step-x; leave it out for flow"),
])
def test_wrong_combinations_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        DenoiserTask(TrainSettings(**{**ONE_STEP, **changes}))
    with pytest.raises(InputError, match="start one"):
        check_one_process(2)
