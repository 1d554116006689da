"""Four steps: the Frechet distance of each, on what those before it drew."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_encode import SMALL
from test_one_step import ONE_STEP, of, run, some
from test_resume import last_state, same

from d_emo.cli import run_verb
from d_emo.config import ClassifierSettings, TrainSettings
from d_emo.data import Digits, spread
from d_emo.errors import InputError
from d_emo.frechet import FourStepObjective, FourStepSampleObjective, Judge, RunningMoments
from d_emo.io.snapshot import load_denoiser
from d_emo.latents import encode, load_codec, sample_moments
from d_emo.sampling import Guidance, Sampler, denoise
from d_emo.sampling.pipeline import DEMOPipeline
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.judging import open_judge
from d_emo.training.latent_classifier import classifier_task, enlarged

WIDE = torch.cat([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
FOUR = {"objective": "four-step", "batch_size": 8, "micro_batch_size": 8}


def objective_of(kind, judge, average, **options):
    objective = kind(null_class=10, label_dropout=0.0, **options)
    moments = [RunningMoments(len(judge.mean), 0.6) for _ in range(4)]
    objective.kept = {"judge": judge, "moments": moments, "average": average}
    return objective


def judge_of(weights):
    judge = Judge(torch.nn.Identity(), None, 8)
    judge.learn(*some(3, weights.shape[1]))
    judge.forward = lambda latents, labels: judge.joint((latents.flatten(1).double() @ weights).square(), labels)
    return judge


@pytest.mark.parametrize("kind", [FourStepObjective, FourStepSampleObjective])
def test_every_step_is_trained_on_what_drawing_brings_it_to(kind, tiny_denoiser):
    """The images that the sampler draws from a noise, step by step, are those that the loss looks at."""
    seen, constant = [], 0.3
    judge = judge_of(torch.randn(256, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    looks = judge.forward
    judge.forward = lambda latents, labels: seen.append(latents.detach()) or looks(latents, labels)
    objective = objective_of(kind, judge, tiny_denoiser, learn_sigma=tiny_denoiser.predicts_variance)
    one = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = objective.draw(torch.Generator().manual_seed(1), 8, (4, 8, 8))._replace(noise=one.repeat(8, 1, 1, 1))
    assert step.timesteps.tolist() == [1000, 750, 500, 250] * 2
    with mock.patch("torch.randn_like", lambda x: torch.full_like(x, constant)):
        objective(tiny_denoiser, step.noise, torch.full((8,), 3), step)["loss"].backward()
    assert tiny_denoiser.final_layer.linear.weight.grad.abs().max() > 0
    sampler, drawn = Sampler(tiny_denoiser, None, objective.noise_schedule().config, guidance=1.0), []
    assert (sampler.steps, type(sampler.scheduler).__name__) == (4, "FlowMatchLCMScheduler")
    scheduler, name = sampler.scheduler, "diffusers.schedulers.scheduling_flow_match_lcm.randn_tensor"
    with mock.patch(name, lambda shape, **options: torch.full(shape, constant)):
        for each in denoise(tiny_denoiser, scheduler, one, torch.tensor([3]), guidance=Guidance(1.0)):
            share = (3 - each.index) / 4  # the last is x_0; before it, x_0 is under a share of the noise
            drawn.append((each.latents - share * constant) / (1 - share))
    torch.testing.assert_close(seen[0], torch.cat(drawn * 2), rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_mean_of_the_distances_of_the_steps():
    """In NumPy: x_t = (1 - t) x_0 + t noise before each step, x_0 = x_t - t v, running moments for each step."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    (real_mean, real_covariance), judge = of(some(3, 3)[0]), judge_of(weights)

    def said(x, t, label, average):
        return np.sin(3 * x) + label + t * (2 if average else 1)

    def network(average):
        def call(x, timestep, class_labels):
            rows = zip(x.double().numpy(), timestep.tolist(), class_labels.tolist(), strict=True)
            sample = np.stack([said(row, t / 1000, label, average) for row, t, label in rows])
            return mock.Mock(sample=torch.from_numpy(sample))

        return call

    objective = objective_of(FourStepObjective, judge, network(average=True), learn_sigma=False)
    means, seconds = np.zeros((4, 3)), np.zeros((4, 3, 3))
    for n in range(3):
        step, labels = objective.draw(generator, 12, (3, 2, 2)), torch.arange(12) % 5
        with mock.patch("torch.randn_like", lambda x: torch.full_like(x, 0.25)):
            losses = objective(network(average=False), step.noise, labels, step)
        b, distances = min(0.6, n / (n + 1)), []
        for k, level in enumerate((1.0, 0.75, 0.5, 0.25)):
            features = []
            for row in range(k, 12, 4):
                x, label = step.noise[row].double().numpy(), labels[row].item()
                for before in range(k):
                    t, following = 1 - before / 4, 1 - (before + 1) / 4
                    x = (1 - following) * (x - t * said(x, t, label, True)) + following * 0.25
                features.append(((x - level * said(x, level, label, False)).reshape(12) @ weights.numpy()) ** 2)
            f = np.stack(features)
            means[k] = b * means[k] + (1 - b) * f.mean(0)
            seconds[k] = b * seconds[k] + (1 - b) * f.T @ f / len(f)
            covariance = seconds[k] - np.outer(means[k], means[k])
            root = scipy.linalg.sqrtm(covariance @ real_covariance.numpy()).real
            traces = np.trace(covariance + real_covariance.numpy() - 2 * root)
            distances.append(((means[k] - real_mean.numpy()) ** 2).sum() + traces)
        assert losses["loss"].item() == losses["fd"].item() == pytest.approx(np.mean(distances), rel=1e-3)
        assert [losses[f"fd_{k}"].item() for k in (1, 2, 3, 4)] == pytest.approx(distances, rel=1e-3)


@pytest.mark.parametrize(("sizes", "words"), [
    ({"batch_size": 12}, "6 images have no equal shares for 4 steps; give a `micro_batch_size` that is a multiple"),
    ({"batch_size": 12, "micro_batch_size": 6}, "6 images have no equal shares for 4 steps; give a `micro_batch_size`"),
    ({"batch_size": 6}, "6 images have no equal shares for 4 steps; give a `batch_size` that is a multiple of 4"),
    ({"batch_size": 256, "flow_weight": 1.0}, "256 images .* for 4 steps and the loss of flow; give a `batch_size`"),
])  # fmt: skip
def test_a_micro_batch_has_all_shares(sizes, words):
    with pytest.raises(InputError, match=words):
        DenoiserTask(TrainSettings(**{**ONE_STEP, "objective": "four-step", "micro_batch_size": None, **sizes}))


def test_what_comes_before_a_step_is_drawn_by_the_average(monkeypatch):
    """At the run's precision; the task asks for the average when it is needed, as the loop replaces it."""
    monkeypatch.setattr("d_emo.training.denoiser.precision_of", lambda settings, device: "bf16")
    task, seen = DenoiserTask(TrainSettings(**{**ONE_STEP, **FOUR})), []

    def average(x, timestep, class_labels):
        seen.append((timestep.tolist(), torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
        return mock.Mock(sample=torch.zeros(len(x), 6, 32, 32))

    task.averaged = average
    task.judge.learn(torch.randn(300, len(task.model.moments[0].mean) - 10), torch.arange(300) % 10)
    step = task.draw(torch.Generator().manual_seed(0), 8)
    task.loss(task.model, [torch.zeros(8, 3, 32, 32), torch.arange(8)], step)
    assert seen == [([1000] * 6, torch.bfloat16), ([750] * 4, torch.bfloat16), ([500] * 2, torch.bfloat16)]


def test_a_run_ends_in_a_snapshot_that_draws_in_four_steps_and_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = {**FOUR, "max_steps": 4, "state_every": 2, "snapshot_every": 4, "mixed_precision": "bf16"}
    task, snapshot = run(tmp_path / "whole", **short)
    run(tmp_path / "parts", **{**short, "max_steps": 2})
    run(tmp_path / "parts", **short)
    assert same(last_state(tmp_path / "parts", 4), last_state(tmp_path / "whole", 4))
    assert [moments.batches.item() for moments in task.model.moments] == [4] * 4
    opened = load_denoiser(snapshot)
    assert (opened.objective, opened.label_dropout) == ("four-step", 0.0)
    arguments = ["--checkpoint", str(snapshot), "--class", "3", "--num-images", "2"]
    run_verb("sample", [*arguments, "--output", "x.png"])
    first, second = (torch.cat(list(Sampler.open(snapshot).images([3, 3], seeds))) for seeds in ([0, 1], [1, 0]))
    assert torch.equal(first, second.flip(0)), "the noise in between comes from an image's own seed as well"
    assert not torch.equal(first[0], first[1])
    for changes, words in [
        (["--steps", "30"], "images of the four-step objective take 4 steps, not 30; give --steps 4"),
        (["--scheduler", "euler"], "euler serves the flow objective, but .* trained with four-step; use one of lcm"),
    ]:
        with pytest.raises(InputError, match=words):
            run_verb("sample", [*arguments, *changes, "--output", "z.png"])
    pipe = DEMOPipeline.from_snapshot(snapshot)
    assert pipe([3], output_type="pt", generator=torch.Generator().manual_seed(0)).images.isfinite().all()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="trained with four-step and predicts flow_four_step; make one of lcm with"):
        pipe([3])
    run_verb("distill", [str(snapshot), "--fd-features", task.settings.fd_features, "--max-steps", "1", "--batch-size",
                         "4", "--fd-images", "60", "--tracker", "none", "--mixed-precision", "bf16"])  # fmt: skip
    assert load_denoiser(tmp_path / "results" / "whole-four-step").objective == "four-step"
    shutil.rmtree(tmp_path / "results")
    measured = ["--features", task.settings.fd_features, "--num-images", "8", "--output"]
    run_verb("reference", ["--dataset", "digits", "--image-size", "32", *measured, "r.npz"])
    run_verb("fid", ["--checkpoint", str(snapshot), "--reference", "r.npz", *measured, "f.json"])
    assert json.loads(Path("f.json").read_text())["sampling"]["steps"] == 4


@pytest.fixture(scope="module")
def of_latents(tmp_path_factory):
    """Settings of a run on stored latents, digits as pixels, and of a classifier of them, which knows nothing."""
    root = tmp_path_factory.mktemp("latents")
    encode(Digits(32), load_codec("pixels"), root / "digits", **{**SMALL, "batch_size": 64, "shard_size": 2000})
    task = classifier_task(ClassifierSettings(
        model="emov2_1m", model_options={"depths": [1, 1, 1, 1], "dims": [40, 40, 40, 40], "window_size": 2},
        latents=str(root / "digits"), image_size=64, noise=0.5,
    ))  # fmt: skip
    task.save_snapshot(root / "classifier", task.model, step=1, minutes=0)
    return {"latents": str(root / "digits"), "dataset": "shapes", "fd_features": f"emov2:{root / 'classifier'}"}


def test_a_classifier_of_latents_sees_them_undecoded_and_a_resumed_run_is_exact(tmp_path, of_latents):
    short = {**FOUR, **of_latents, "batch_size": 4, "micro_batch_size": 4, "max_steps": 2, "state_every": 1}
    task, snapshot = run(tmp_path / "whole", **short)
    run(tmp_path / "parts", **{**short, "max_steps": 1})
    run(tmp_path / "parts", **short)
    assert same(last_state(tmp_path / "parts", 2), last_state(tmp_path / "whole", 2))
    assert (task.judge.codec, task.judge.side, task.judge.noise) == (None, 64, 0.5)
    assert load_denoiser(snapshot).objective == "four-step"
    cached = {**short, "latents": None, "dataset": "digits", "cache_latents": True}
    task, _ = run(tmp_path / "cached", **{**cached, "max_steps": 1})
    assert task.judge.codec is None
    images = {**cached, "cache_latents": False, "init_from": None, "model": "D-EMOv2-Ti-2", "vae": "d-emo-f8"}
    settings = TrainSettings(**images).resolve()
    with pytest.raises(InputError, match="looks at latents of pixels of side 32, those of the run are of d-emo-f8 of"):
        open_judge(settings, load_codec("d-emo-f8"), ["a", "b"], latent_side=4, encoded=False)
    other = mock.Mock(fingerprint="another", scaling=1.0, shift=0.0)
    with pytest.raises(InputError, match="or of the same name and another encoder; train a classifier of these"):
        open_judge(settings, other, ["a", "b"], latent_side=32, encoded=False)


def test_real_latents_are_drawn_from_their_posterior(of_latents, monkeypatch):
    task = DenoiserTask(TrainSettings(**{**ONE_STEP, **FOUR, **of_latents, "fd_images": 64}))
    task.images.flip, task.judge.noise, seen, stored = False, 0.0, [], task.dataset
    wide = mock.MagicMock()  # with a posterior of deviation 1; that of pixels has none
    wide.__getitem__.side_effect = lambda index: (stored[index][0] + WIDE, stored[index][1])
    task.dataset = wide
    monkeypatch.setattr(task.judge, "features", lambda images, generator: seen.append(images) or images.flatten(1))
    monkeypatch.setattr(task.judge, "learn", lambda features, labels: seen.append((features, labels)))
    task._learn_real_images(torch.device("cpu"))
    generator, chosen = torch.Generator().manual_seed(task.settings.seed), spread(len(task.images), 64)
    for part, drawn in zip((chosen[:32], chosen[32:]), seen, strict=False):
        step = task.draw(generator, 32)
        moments = torch.stack([wide[index][0] for index in part]).float()
        torch.testing.assert_close(drawn, sample_moments(moments, step.posterior_noise))
    assert seen[2][1].tolist() == [stored.label(index) for index in chosen]


def test_noise_is_mixed_into_latents_before_they_are_enlarged():
    seen, latents = [], torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network = torch.nn.Module()
    network.forward_features = seen.append
    network.forward_head = lambda features, pre_logits: torch.zeros(3, 2)
    torch.manual_seed(0)
    Judge(network, None, 32, noise=0.5).features(latents)
    torch.manual_seed(0)
    t = 0.5 * torch.rand(3, 1, 1, 1)
    noisy = (1 - t) * latents + t * torch.randn(latents.shape)
    torch.testing.assert_close(seen[0], enlarged(noisy, 32), rtol=1e-5, atol=1e-5)
