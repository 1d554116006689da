"""What a flow network predicts, where its timesteps lie, and the contrastive term, against the papers' equations."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_sampling import Gaussian

from d_emo.cli import run_verb
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.latents import PixelCodec
from d_emo.objective import FlowNoiseObjective, FlowObjective, FlowSampleObjective
from d_emo.sampling import Guidance, Sampler, make_scheduler, preview_grid, sample
from d_emo.sampling.pipeline import DEMOPipeline
from d_emo.tables import objective_of, schedulers_of
from d_emo.training.denoiser import DenoiserTask

TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48}, "dataset": "digits", "image_size": 8,
    "vae": "pixels", "batch_size": 4, "max_steps": 2,
}
KINDS = {"flow": FlowObjective, "flow-x": FlowSampleObjective, "flow-eps": FlowNoiseObjective}


class Fixed(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x, timestep, class_labels):
        return SimpleNamespace(sample=self.output)


def batch(kind, timesteps, **options):
    generator = torch.Generator().manual_seed(0)
    objective = kind(null_class=3, learn_sigma=False, **options)
    draws = objective.draw(generator, len(timesteps), (2, 3, 3))._replace(timesteps=torch.tensor(timesteps))
    latents, output = torch.randn(2, len(timesteps), 2, 3, 3, generator=generator)
    losses = objective(Fixed(output), latents, torch.zeros(len(timesteps), dtype=torch.long), draws)
    return latents, draws.noise, output, losses


def test_x_prediction_has_the_velocity_loss_of_jit():
    """JiT, section 4.2, its time t being one minus ours: v = (x - z) / max(1 - t, 0.05), for network and data."""
    levels = [10.0, 300.0, 999.0]
    latents, noise, x, losses = batch(FlowSampleObjective, levels)
    total = 0.0
    for i, level in enumerate(levels):
        t = 1 - level / 1000
        z = t * latents[i] + (1 - t) * noise[i]
        v, v_theta = (latents[i] - z) / max(1 - t, 0.05), (x[i] - z) / max(1 - t, 0.05)
        assert level < 50 or torch.allclose(v, latents[i] - noise[i], atol=1e-4)
        total += ((v_theta - v) ** 2).sum().item()
    assert losses["loss"].item() == losses["mse"].item() == pytest.approx(total / latents.numel(), rel=1e-5)


def test_noise_prediction_has_the_velocity_loss():
    """Table 1 of the same paper: v = (z - eps) / t."""
    levels = [10.0, 300.0, 999.0]
    latents, noise, eps, losses = batch(FlowNoiseObjective, levels)
    total = 0.0
    for i, level in enumerate(levels):
        t = 1 - level / 1000
        z = t * latents[i] + (1 - t) * noise[i]
        total += ((((z - eps[i]) - (z - noise[i])) / max(t, 0.05)) ** 2).sum().item()
    assert losses["loss"].item() == pytest.approx(total / latents.numel(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_contrastive_flow_matching(kind):
    """Stoica et al., 2025: E |v - (noise - x)|^2 - lambda |v - (noise' - x')|^2, a prime for another pair.

    v is what the network's x or noise means, at levels where nothing is divided by less than 0.05.
    """
    levels = [100.0, 300.0, 900.0]
    latents, noise, said, losses = batch(KINDS[kind], levels, contrastive=0.05)
    total = other = 0.0
    for i, level in enumerate(levels):
        t = level / 1000
        z = (1 - t) * latents[i] + t * noise[i]
        v = {"flow": said[i], "flow-x": (z - said[i]) / t, "flow-eps": (said[i] - z) / (1 - t)}[kind]
        total += ((v - (noise[i] - latents[i])) ** 2).sum().item()
        other += ((v - (noise[i - 1] - latents[i - 1])) ** 2).sum().item()
    assert losses["loss"].item() == pytest.approx((total - 0.05 * other) / latents.numel(), rel=1e-5)
    assert losses["mse"].item() == pytest.approx(total / latents.numel(), rel=1e-5)
    assert losses["contrast"].item() == pytest.approx(other / latents.numel(), rel=1e-5)
    with pytest.raises(InputError, match="`micro_batch_size` 2 or more"):
        batch(FlowObjective, [10.0], contrastive=0.05)


def test_a_shift_moves_the_timesteps_of_training_and_of_sampling_alike():
    """Stable Diffusion 3, eq. 23: t_m = s t_n / (1 + (s - 1) t_n), s = sqrt(m / n)."""
    plain = FlowObjective(null_class=1).draw_timesteps(torch.Generator().manual_seed(0), 100) / 1000
    objective = FlowObjective(null_class=1, time_shift=3.0)
    shifted = objective.draw_timesteps(torch.Generator().manual_seed(0), 100) / 1000
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))
    scheduler = make_scheduler("euler", objective.noise_schedule().config)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


@pytest.mark.parametrize(("shift", "wanted"), [("auto", (3 * 8 * 8 / 4096) ** 0.5), (2.0, 2.0), (None, 1.0)])
def test_a_run_shifts_by_the_size_of_its_latents(shift, wanted):
    task = DenoiserTask(TrainSettings(**TINY, objective="flow", time_shift=shift))
    assert task.objective.time_shift == pytest.approx(wanted) and task.scheduler.config.shift == pytest.approx(wanted)


class Said(Gaussian):
    """The same velocity, said as x_0 or as noise."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, timestep, class_labels):
        velocity, t = super().forward(x, timestep, class_labels).sample, timestep / 1000
        said = {"flow": velocity, "flow-x": x - t * velocity, "flow-eps": x + (1 - t) * velocity}
        return SimpleNamespace(sample=said[self.kind])


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("kind", ["flow-x", "flow-eps"])
def test_samplers_convert_what_the_network_says(kind, name):
    drawn = {}
    for each in ("flow", kind):
        scheduler = make_scheduler(name, KINDS[each](null_class=1).noise_schedule().config)
        steps = sample(Said(each), scheduler, [0], [3], steps=20, guidance=Guidance(1.0))
        drawn[each] = [step.latents for step in steps][-1]
    # flow-eps divides by no less than 0.05: the first step, where the noise says nothing of the image, goes nowhere
    torch.testing.assert_close(drawn[kind], drawn["flow"], rtol=1e-3, atol=0.1 if kind == "flow-eps" else 1e-3)


def test_the_kinds_have_the_schedulers_of_flow_and_say_what_they_are():
    for name, kind in KINDS.items():
        config = kind(null_class=1).noise_schedule().config
        assert objective_of(config) == name and schedulers_of(name) == schedulers_of("flow")
        for scheduler in schedulers_of(name):
            assert objective_of(make_scheduler(scheduler, config).config) == name
    with pytest.raises(InputError, match="euler serves the flow objective, .* trained with eps"):
        make_scheduler("euler", {"num_train_timesteps": 1000, "prediction_type": "epsilon"})
    with pytest.raises(InputError, match="flow_score"):
        objective_of({"prediction_type": "flow_score"})


def test_a_snapshot_is_drawn_alike_by_sampler_pipeline_and_preview(tmp_path, monkeypatch):
    """And otherwise than as the velocity that it is not; one of the future is refused."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", TINY["model"], "--model-options", "{depth: 1, hidden_size: 48}", "--dataset", "digits",
             "--image-size", "8", "--vae", "pixels", "--batch-size", "4", "--max-steps", "2", "--lr", "0.01"]
    run_verb("train", [*flags, "--objective", "flow-x", "--output-dir", "run"])
    snapshot = load_denoiser("run")
    assert snapshot.objective == "flow-x" and snapshot.scheduler_config["prediction_type"] == "flow_sample"
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = next(Sampler.open(load_denoiser("run"), steps=4, guidance=2.0, device="cpu").images([1], [0]))
    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "latents": noise, "output_type": "pt"}
    pipe = DEMOPipeline.from_pretrained("run")
    pipe.set_progress_bar_config(disable=True)
    images = (pipe([1], **options).images * 255).round().byte()
    assert (images.int() - drawn.int()).abs().max() <= 1
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # of one's own, which says nothing of predictions
    assert ((pipe([1], **options).images * 255).round().int() - drawn.int()).abs().max() <= 1
    pictures = []
    for objective in ("flow-x", None, "flow"):
        preview_grid(
            tmp_path / "p.png", snapshot.model, scheduler_config=snapshot.scheduler_config, codec=PixelCodec(),
            class_names=snapshot.class_names, guidance_scale=1.0, objective=objective,
        )
        pictures.append((tmp_path / "p.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    file = tmp_path / "run" / "snapshots" / "step-2" / "snapshot.json"
    file.write_text(file.read_text().replace('"flow-x"', '"flow-score"'))
    with pytest.raises(InputError, match="unknown objective 'flow-score'"):
        load_denoiser("run")


@pytest.mark.parametrize(("name", "value"), [("contrastive", 0.05), ("time_shift", 2.0), ("time_shift", "auto")])
def test_terms_of_flow_are_refused_for_eps(name, value):
    with pytest.raises(InputError, match=f"`{name}` {value} belongs to `objective` flow, flow-x, flow-eps; .* for eps"):
        DenoiserTask(TrainSettings(**TINY, **{name: value}))
    with pytest.raises(InputError, match="`time_shift` must be"):
        TrainSettings(time_shift="wide")
    assert TrainSettings.from_mapping({"time_shift": "auto", "objective": "flow"}).time_shift == "auto"
