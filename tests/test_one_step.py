"""One-step generation by the Frechet distance of features."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_resume import last_state, same

from d_emo.cli import run_verb
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.evaluation.statistics import frechet_distance
from d_emo.frechet import Judge, OneStepObjective, OneStepSampleObjective, RunningMoments, check_one_process
from d_emo.io.snapshot import load_classifier, load_denoiser
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


def some(seed, dim=5):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(40, dim, generator=generator, dtype=torch.float64) @ torch.randn(
        dim, dim, generator=generator, dtype=torch.float64) + seed
    return features, torch.arange(40) % 4


def of(features):
    return features.mean(0), features.mT.cov()


def test_the_loss_is_the_frechet_distance_of_the_tables_and_its_gradient_is_right():
    judge = Judge(torch.nn.Identity(), None, 8)
    (mean, covariance), (real_mean, real_covariance) = of(some(1)[0]), of(some(2)[0])
    judge.learn(*some(2))
    distance = judge.distance(mean - real_mean, covariance).item()  # features are taken from the real mean
    assert distance == pytest.approx(frechet_distance(mean, covariance, real_mean, real_covariance), rel=1e-6)
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
        def __call__(self, latents, labels):
            assert labels.tolist() == [3, 4]
            seen.append(latents)
            return latents.flatten(1)

        def distance(self, mean, covariance):
            return mean.sum()

    objective.kept = {"judge": Seen(), "moments": [lambda features: (features.mean(0), None)]}
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
    (real_mean, real_covariance), judge = of(some(3, 3)[0]), Judge(torch.nn.Identity(), None, 8)
    judge.learn(*some(3, 3))
    judge.forward = lambda latents, labels: judge.joint((latents.flatten(1).double() @ weights).square(), labels)
    objective = kind(null_class=9, label_dropout=0.0, learn_sigma=False, fd_decay=0.6)
    objective.kept = {"judge": judge, "moments": [RunningMoments(3, 0.6)]}
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


def test_classes_stand_beside_the_features_as_their_real_images_mean():
    """DeVries et al., 2019: the Frechet distance of (features, classes); a class is the mean of its real images."""
    features, labels = some(4)
    judge = Judge(torch.nn.Identity(), None, 8, class_names="abcd", label_weight=0.5)
    judge.learn(features, labels)
    means = np.stack([features[labels == label].mean(0).numpy() for label in range(4)])
    beside = np.concatenate([features.numpy(), 0.5 * means[labels.numpy()]], axis=1)
    np.testing.assert_allclose(judge.joint(features, labels)[:, :5], features - features.mean(0), rtol=1e-9)
    points = judge.classes.numpy()  # of fewer classes than features: they lie to each other and to 0 as the means do
    centred = 0.5 * (means - features.numpy().mean(0))
    assert points.shape == (4, 4) and judge.width(5) == 9 and judge.width(3) == 6
    np.testing.assert_allclose(points @ points.T, centred @ centred.T, atol=1e-10)
    drawn, asked = some(5)[0], labels.flip(0)
    found = judge.distance(*of(judge.joint(drawn, asked))).item()
    joint = np.concatenate([drawn.numpy(), 0.5 * means[asked.numpy()]], axis=1)
    wanted = frechet_distance(*of(torch.from_numpy(joint)), *of(torch.from_numpy(beside)))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert judge.distance(*of(judge.joint(features, labels))).item() == pytest.approx(0, abs=1e-4)
    plain = Judge(torch.nn.Identity(), None, 8)
    plain.learn(features, labels)
    swapped = labels.roll(1)  # the same images, but of other classes than were asked for
    assert plain.distance(*of(plain.joint(features, swapped))).item() == pytest.approx(0, abs=1e-4)
    assert judge.distance(*of(judge.joint(features, swapped))).item() > 0.1


def test_of_many_classes_the_means_leading_axes_stand_beside_the_features(monkeypatch):
    monkeypatch.setattr("d_emo.frechet.CLASS_AXES", 2)
    features, labels = some(4)
    judge = Judge(torch.nn.Identity(), None, 8, class_names="abcd", label_weight=0.5)
    judge.learn(features, labels)
    means = np.stack([features[labels == label].mean(0).numpy() for label in range(4)]) - features.numpy().mean(0)
    left, sizes, _ = np.linalg.svd(0.5 * means)
    wanted = left[:, :2] * sizes[:2]
    assert judge.classes.shape == (4, 2) and judge.width(5) == 7
    np.testing.assert_allclose(judge.classes @ judge.classes.mT, wanted @ wanted.T, atol=1e-10)
    again = Judge(torch.nn.Identity(), None, 8, class_names="abcd", label_weight=0.5)
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    again.learn(features, labels)
    torch.testing.assert_close(again.classes, judge.classes)


def test_what_never_moves_on_real_images_does_not_weigh_most():
    features, labels = some(4)
    features[:, 2] = 7 + 1e-7 * features[:, 2]
    judge = Judge(torch.nn.Identity(), None, 8, stages=True)
    judge.learn(features, labels)
    assert judge.scale[2] > 1e-2 and judge.joint(features, labels).abs().max() < 10


def test_a_class_without_a_real_image_is_refused_by_name():
    features, labels = some(4)
    with pytest.raises(InputError, match="40 real images of `fd_images` hold none of class gnu; give more, or leave"):
        Judge(torch.nn.Identity(), None, 8, class_names=["ant", "bee", "cat", "dog", "gnu"], label_weight=1.0).learn(
            features, labels)
    Judge(torch.nn.Identity(), None, 8, class_names=["ant", "bee", "cat", "dog", "gnu"]).learn(features, labels)


def test_the_features_of_all_stages_are_their_means_each_by_its_deviation():
    network = load_classifier(OLD / "classifier").model
    images, labels = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(6) % 2
    codec = type("Codec", (), {"decoded": staticmethod(lambda latents: latents)})
    judge = Judge(network, codec, 32, stages=True)
    with torch.no_grad():
        judge.learn(judge.features(images), labels)
        found, maps = judge(images, labels), network.forward_intermediates(images, norm=True, intermediates_only=True)
        pooled = network.forward_head(network.forward_features(images), pre_logits=True)
    means = torch.cat([each.mean((2, 3)) for each in maps], dim=1)
    assert means.shape[1] == sum(stage["num_chs"] for stage in network.feature_info)
    deviation = means.double().std(0)
    wanted = (means - means.double().mean(0)) / deviation.clamp(min=1e-2 * deviation.median() + 1e-6)
    torch.testing.assert_close(found, wanted.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(means[:, -pooled.shape[1] :], pooled, rtol=1e-4, atol=1e-5)


def test_a_judge_looks_through_the_noise_that_its_classifier_was_trained_with():
    network = torch.nn.Module()
    network.forward_features, network.forward_head = lambda images: images, lambda images, pre_logits: images.flatten(1)
    images = torch.ones(500, 3, 4, 4)
    judge = Judge(network, None, 4, noise=0.6)
    torch.manual_seed(0)
    seen = judge.features(images).view(500, -1)
    share, spread = 1 - seen.mean(1), seen.std(1)  # (1 - t) 1 + t noise
    assert share.min() > -0.3 and 0.25 < share.mean() < 0.35 and 0.25 < spread.mean() < 0.35
    assert torch.corrcoef(torch.stack([share, spread]))[0, 1] > 0.7
    torch.manual_seed(0)
    assert torch.equal(judge.features(images).view(500, -1), seen)


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
    assert task.model.moments[0].batches == 6
    dim = sum(stage["num_chs"] for stage in task.judge.network.feature_info)
    assert task.model.moments[0].mean.shape == (dim + 10,)  # of all stages, and of classes beside them
    assert not any(name.startswith("moments") for name in load_file(next(snapshot.glob("transformer/*.safetensors"))))
    opened = load_denoiser(snapshot)
    assert (opened.objective, opened.label_dropout) == ("one-step", 0.0)
    card = (snapshot / "README.md").read_text()
    assert "; in the features of emov2:classifier, its last four stages, with classes of weight 1 |" in card
    run_verb("sample", ["--checkpoint", str(snapshot), "--class", "3", "--num-images", "2", "--output", "x.png"])
    with pytest.raises(InputError, match="--steps|images of the one-step objective take 1 step, not 30"):
        run_verb("sample", ["--checkpoint", str(snapshot), "--class", "3", "--steps", "30", "--output", "y.png"])
    with pytest.raises(InputError, match="`guidance_scale` 2 needs a null class"):
        Sampler.open(snapshot, guidance=2.0)


def seeing_through(folder, noise):
    """The classifier's snapshot, as one that was trained with noise."""
    shutil.copytree(OLD / "classifier", folder)
    meta = json.loads((folder / "snapshot.json").read_text())
    (folder / "snapshot.json").write_text(json.dumps({**meta, "noise": noise}))
    return {"fd_features": f"emov2:{folder}"}


def test_a_classifier_that_was_trained_with_noise_sees_it_and_a_resumed_run_is_exact(tmp_path):
    features = seeing_through(tmp_path / "noisy", 0.6)
    task, _ = run(tmp_path / "whole", max_steps=4, state_every=2, **features)
    run(tmp_path / "parts", max_steps=2, state_every=2, **features)
    run(tmp_path / "parts", max_steps=4, state_every=2, **features)
    assert task.judge.noise == 0.6 and same(last_state(tmp_path / "parts", 4), last_state(tmp_path / "whole", 4))
    run(tmp_path / "clean", max_steps=4, state_every=2)
    assert not same(last_state(tmp_path / "clean", 4), last_state(tmp_path / "whole", 4))
    with pytest.raises(InputError, match="noise"):
        DenoiserTask(TrainSettings(**{**ONE_STEP, **seeing_through(tmp_path / "damaged", "x")}))


def test_stages_are_an_emos_or_timms_and_one_class_stands_for_nothing(monkeypatch):
    task = DenoiserTask(TrainSettings(**{**ONE_STEP, "unconditional": True}))
    dims = sum(stage["num_chs"] for stage in task.judge.network.feature_info)
    assert task.judge.label_weight == 0 and len(task.model.moments[0].mean) == dims
    other = timm.create_model("resnet10t", num_classes=10)
    opened = mock.Mock(model=other, image_size=32, meta={})
    monkeypatch.setattr("d_emo.training.judging.load_classifier", lambda source, **options: opened)
    task = DenoiserTask(TrainSettings(**ONE_STEP))
    assert len(task.model.moments[0].mean) == 64 + 128 + 256 + 512 + 10
    monkeypatch.delattr(timm.models.ResNet, "forward_intermediates")
    with pytest.raises(InputError, match="is a ResNet, which does not show four stages; take its last"):
        DenoiserTask(TrainSettings(**ONE_STEP))
    task = DenoiserTask(TrainSettings(**{**ONE_STEP, "fd_stages": "last"}))
    assert len(task.model.moments[0].mean) == other.num_features + 10


@pytest.mark.parametrize(("changes", "words"), [
    ({"init_from": None, "image_size": 32, "vae": "pixels"}, "goes on from a snapshot of flow, not of none; name one"),
    ({"objective": "one-step-x"}, "goes on from a snapshot of flow-x, not of flow"),
    ({"fd_features": None}, "`objective` one-step needs `fd_features` emov2:SNAPSHOT"),
    ({"fd_features": "inception"}, "`fd_features` inception passes no gradients"),
    ({"cache_latents": True}, "looks at images, of which `cache_latents` leaves none; name images, or a classifier of"),
    ({"align": "vae"}, "has no use for `align`; leave it out"),
    ({"objective": "flow"}, "`fd_features` .* belongs to `objective` one-step, one-step-x, four-step, four-step-x;"),
])
def test_wrong_combinations_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        DenoiserTask(TrainSettings(**{**ONE_STEP, **changes}))
    with pytest.raises(InputError, match="start one"):
        check_one_process(2)


def test_a_refused_step_leaves_the_statistics_as_they_were(tmp_path, monkeypatch):
    distances, honest = iter([1.0, float("nan"), 1.0]), Judge.distance
    monkeypatch.setattr(Judge, "distance", lambda self, *moments: next(distances) * honest(self, *moments))
    task, _ = run(tmp_path / "run", max_steps=3, nan="skip")
    assert task.model.moments[0].batches == 2
