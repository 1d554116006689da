import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from d_emo import sampling
from d_emo.errors import InputError
from d_emo.latents import load_codec
from d_emo.sampling.denoising import decode
from d_emo.sampling.guidance import guided
from d_emo.tables import schedulers_of

CONFIG = DDPMScheduler(
    beta_schedule="linear", clip_sample=False, timestep_spacing="linspace", variance_type="learned_range"
).config
FLOW = FlowMatchEulerDiscreteScheduler(shift=1.0).config
CONFIGS = {"euler": FLOW, "heun": FLOW, "lcm": {**FLOW, "prediction_type": "flow_four_step"}}


SCHEDULER_NAMES = [*schedulers_of("eps"), *schedulers_of("flow"), *schedulers_of("four-step")]


def steps_of(model, name="dpm++", labels=(1, 2, 3), seeds=(5, 6, 7), *, steps=4, batch_size=64, **guidance):
    scheduler, guidance = sampling.make_scheduler(name, CONFIGS.get(name, CONFIG)), sampling.Guidance(**guidance)
    return sampling.sample(model, scheduler, labels, seeds, steps=steps, guidance=guidance, batch_size=batch_size)


def draw(*args, **options):
    return torch.cat([step.latents for step in steps_of(*args, **options) if step.is_last])


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_samples_depend_on_their_seed_and_class_not_on_their_batch(tiny_denoiser, name, scale):
    whole = draw(tiny_denoiser, name, scale=scale)
    assert whole.shape == (3, 4, 8, 8) and whole.isfinite().all()
    for size in (1, 2):
        assert torch.equal(draw(tiny_denoiser, name, batch_size=size, scale=scale), whole)
    assert torch.equal(draw(tiny_denoiser, name, labels=[3], seeds=[7], scale=scale), whole[2:])
    if scale > 1:
        return
    assert not torch.allclose(draw(tiny_denoiser, name, seeds=[5, 6, 8])[2], whole[2], atol=1e-2)
    assert not torch.allclose(draw(tiny_denoiser, name, labels=[1, 2, 4])[2], whole[2], atol=1e-6)


@pytest.mark.slow
def test_two_processes_draw_what_one_does(tmp_path, tiny_denoiser):
    """Seeds 5 and 7 here, seed 6 in another process: the same bits as all three together."""
    tiny_denoiser.save_pretrained(tmp_path / "model")
    code = """
import sys, torch
sys.path.insert(0, "tests")
from d_emo import Denoiser, sampling
from test_sampling import draw
torch.set_num_threads(int(sys.argv[1]))
model = Denoiser.from_pretrained(sys.argv[2], low_cpu_mem_usage=False).eval()
torch.save(draw(model, "ddpm", [2], [6], scale=2.0), sys.argv[3])
"""
    command = [sys.executable, "-c", code, str(torch.get_num_threads()), str(tmp_path / "model"), str(tmp_path / "x")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = draw(tiny_denoiser, "ddpm", scale=2.0)
    assert torch.equal(torch.load(tmp_path / "x"), whole[1:2])
    assert torch.equal(draw(tiny_denoiser, "ddpm", [1, 3], [5, 7], scale=2.0), whole[::2])


def test_decoding_does_not_depend_on_the_batch():
    codec, latents = load_codec("d-emo-f8"), torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = decode(codec, latents)
    assert torch.equal(decode(codec, latents[1:2]), whole[1:2]) and whole.shape == (3, 3, 32, 32)


class Recorded(torch.nn.Module):
    """A denoiser with known answers, which notes what it was asked."""

    latent_shape, tokens = (4, 12, 12), 144
    dtype, device, null_class = torch.float32, torch.device("cpu"), 10

    def label_rows(self):
        return torch.zeros(self.null_class + 1, 1)

    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, timestep, class_labels):
        self.asked.append((int(timestep), class_labels.tolist()))
        eps = torch.sin(3 * x + 0.1 * class_labels[:, None, None, None]) + 0.002 * timestep
        return SimpleNamespace(sample=torch.cat([eps, torch.cos(eps + x)], dim=1))


def plain_ddpm(denoiser, label, seed, steps):
    """Improved DDPM's ancestral sampling on a respaced schedule, from the posterior's equations, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 12, 12, generator=generator).double()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    kept = np.round(np.linspace(0, 999, steps)).astype(int)
    bar = alpha_bar[kept]
    before = np.concatenate([[1.0], bar[:-1]])
    beta = 1 - bar / before
    for i in reversed(range(steps)):
        out = denoiser(x[None].float(), torch.tensor(kept[i]), torch.tensor([label])).sample[0].double()
        eps, v = out[:4], out[4:]
        x0 = (x - np.sqrt(1 - bar[i]) * eps) / np.sqrt(bar[i])
        mean = np.sqrt(before[i]) * beta[i] / (1 - bar[i]) * x0
        mean = mean + np.sqrt(1 - beta[i]) * (1 - before[i]) / (1 - bar[i]) * x
        if i == 0:
            return mean
        log_low, log_high = np.log(beta[i] * (1 - before[i]) / (1 - bar[i])), np.log(beta[i])
        log_variance = (v + 1) / 2 * log_high + (1 - v) / 2 * log_low
        x = mean + (0.5 * log_variance).exp() * torch.randn(1, 4, 12, 12, generator=generator)[0].double()


@pytest.mark.parametrize("steps", [10, 50, 250, 1000])
def test_ddpm_is_improved_ddpms_sampler_at_any_number_of_steps(steps):
    expected = plain_ddpm(Recorded(), 3, 8, steps)
    denoiser = Recorded()
    ours = draw(denoiser, "ddpm", [3], [8], steps=steps)[0].double()
    assert len(denoiser.asked) == steps and denoiser.asked[0][0] == 999 and denoiser.asked[-1][0] == 0
    # relative to the values on the way: divided by sqrt(alpha-bar), float32 rounding grows and fades again
    assert (ours - expected).abs().max() < 2e-3 * max(1, expected.abs().max())


def test_guidance_of_three_channels_leaves_the_others_to_the_class():
    x, t, labels = torch.randn(2, 4, 12, 12), torch.tensor(500), torch.tensor([1, 2])
    given = Recorded()(x, t, labels).sample
    null = Recorded()(x, t, torch.tensor([10, 10])).sample
    pushed = guided(Recorded(), x, t, labels, 3.0, "3")
    torch.testing.assert_close(pushed[:, :3], null[:, :3] + 3 * (given[:, :3] - null[:, :3]))
    assert torch.equal(pushed[:, 3:], given[:, 3:])
    assert not torch.equal(pushed, guided(Recorded(), x, t, labels, 3.0, "all"))


def test_guidance_interval_costs_a_second_pass_only_inside():
    denoiser = Recorded()
    draw(denoiser, "ddim", [1], [0], steps=10, scale=2.0, interval=(0.25, 0.75))
    guided = {t for t, labels in denoiser.asked if labels == [1, 10]}
    plain = {t for t, labels in denoiser.asked if labels == [1]}
    assert guided == {300, 400, 500, 600, 700} and plain == {0, 100, 200, 800, 900} and len(denoiser.asked) == 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [1, 11, 2]}, "class label 11 is out of range.*0 to 9"),
        ({"labels": [1, 2]}, "2 class labels and 3 seeds"),
        ({"steps": 0}, "positive integer, not 0"),
        ({"steps": 1001}, "1001 steps are more than the 1000"),
        ({"name": "ddim", "steps": 600}, "ddim cannot lay 600 steps.*use 1000"),
        *(({"name": name, "steps": 1000}, "at most 999 steps") for name in ("dpm++", "unipc", "deis")),
        ({"scale": float("nan")}, "`guidance_scale` must be finite and not negative"),
        ({"channels": "2"}, "all or 3, not '2'"),
        ({"interval": (0.7, 0.2)}, "two rising numbers"),
    ],
)
def test_what_cannot_be_sampled_is_said(options, words):
    with pytest.raises(InputError, match=words):
        draw(Recorded(), **options)


@pytest.mark.parametrize("name", ["dpm++", "unipc", "deis"])
def test_solvers_bear_999_steps(name):
    assert draw(Recorded(), name, [1], [0], steps=999).isfinite().all()


class Broken(Recorded):
    """Gives a value that is none, late in the denoising of class 2 alone."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, timestep, class_labels):
        output = super().forward(x, timestep, class_labels)
        output.sample[(class_labels == 2) & (timestep < 500)] += self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_are_no_pictures(value):
    assert draw(Broken(value), labels=[1, 1], seeds=[5, 6]).isfinite().all()
    with pytest.raises(InputError, match="guidance 1, 4 steps.* NaN or infinite values; the denoiser's weights"):
        draw(Broken(value), labels=[1, 2], seeds=[5, 6])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_codec_that_gives_no_finite_values_is_named(value):
    codec, latents = load_codec("d-emo-f8"), torch.zeros(2, 4, 4, 4)
    assert decode(codec, latents).isfinite().all()
    codec.vae.decoder.conv_out.bias.data[0] = value
    with pytest.raises(InputError, match="the codec d-emo-f8 decodes .* NaN or infinite values"):
        decode(codec, latents)


def test_a_schedulers_config_makes_another(tiny_denoiser):
    fast = sampling.make_scheduler("dpm++", CONFIG)
    assert sampling.make_scheduler("ddpm", fast.config).config.variance_type == "learned_range"
    fixed = {**CONFIG, "variance_type": "fixed_large"}
    through = sampling.make_scheduler("dpm++", fixed)
    assert sampling.make_scheduler("ddpm", through.config).config.variance_type == "fixed_large"


def test_classes_are_mixed_from_end_to_end(tiny_denoiser):
    plain = draw(tiny_denoiser, labels=[1, 4], seeds=[3, 3])
    labels = sampling.mix_classes(tiny_denoiser, 1, 4, 3)
    path = draw(tiny_denoiser, labels=labels, seeds=[3] * 3)
    assert torch.equal(path[[0, 2]], plain)
    assert not torch.equal(path[1], path[0]) and not torch.equal(path[1], path[2])
    assert tiny_denoiser.null_class == 10


def test_trajectories_keep_the_latents_on_the_way(tiny_denoiser):
    trajectory, seen = sampling.Trajectory(6, keep=3), []
    for step in steps_of(tiny_denoiser, steps=6, batch_size=2):
        trajectory.take(step)
        seen.append(step)
    assert sorted(trajectory.latents) == [1, 3, 5] and len(seen) == 12
    assert torch.equal(torch.cat(trajectory.latents[5]), draw(tiny_denoiser, steps=6))
    assert torch.equal(trajectory.latents[1][0], seen[1].latents)
    frames = trajectory.images(SimpleNamespace(
        codec=SimpleNamespace(decode=lambda z: z[:, :3].clamp(-1, 1)), device=torch.device("cpu")
    ))
    assert frames.shape == (3, 3, 3, 8, 8) and frames.dtype == torch.uint8


def test_a_prepared_denoiser_draws_the_same(tiny_denoiser):
    plain = draw(tiny_denoiser)
    for _ in range(20):  # statistics that are worth folding
        tiny_denoiser.train()(torch.randn(8, 4, 8, 8) * 2, torch.tensor(3), torch.zeros(8, dtype=torch.long))
    tiny_denoiser.eval()
    trained = draw(tiny_denoiser)
    assert not torch.allclose(trained, plain, atol=1e-3)
    sampling.prepare_denoiser(tiny_denoiser)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in tiny_denoiser.modules())
    torch.testing.assert_close(draw(tiny_denoiser), trained, rtol=1e-3, atol=1e-4)
    half = sampling.prepare_denoiser(tiny_denoiser, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(draw(half), trained, rtol=0.1, atol=0.1)


def test_guidance_of_one_is_a_single_pass_and_of_zero_ignores_the_class(tiny_denoiser):
    passes = []
    tiny_denoiser.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    draw(tiny_denoiser, scale=1.0)
    assert passes == [8] * 4, "three images and five that fill up the part: one pass a step"
    passes.clear()
    one = draw(tiny_denoiser, scale=0.0, labels=(1, 1, 1))
    assert passes == [16] * 4
    torch.testing.assert_close(one, draw(tiny_denoiser, scale=0.0, labels=(2, 3, 4)))


def test_guidance_extrapolates_the_prediction_and_keeps_the_variance(tiny_denoiser):
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.tensor([1, 2])
    with torch.no_grad():
        pushed = guided(tiny_denoiser, x, t, labels, 3.0)
        given = tiny_denoiser(x, timestep=t, class_labels=labels).sample
        null = tiny_denoiser(x, timestep=t, class_labels=torch.tensor([10, 10])).sample
    torch.testing.assert_close(pushed[:, :4], null[:, :4] + 3 * (given[:, :4] - null[:, :4]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pushed[:, 4:], given[:, 4:], rtol=1e-4, atol=1e-5)


class Gaussian(torch.nn.Module):
    """The exact velocity at x_t = (1 - t) x_0 + t noise when the data are N(mean, std^2)."""

    latent_shape, tokens = (4, 40, 40), 1600
    dtype, device, null_class = torch.float32, torch.device("cpu"), 1
    mean, std = 0.7, 0.3

    def label_rows(self):
        return torch.zeros(2, 1)

    def forward(self, x, timestep, class_labels):
        t = timestep / 1000
        variance = ((1 - t) * self.std) ** 2 + t**2
        slope = (t - (1 - t) * self.std**2) / variance
        return SimpleNamespace(sample=-self.mean + slope * (x - (1 - t) * self.mean))


@pytest.mark.parametrize(("name", "steps", "gain"), [("euler", 64, 2), ("heun", 32, 4)])
def test_flow_samplers_carry_noise_to_the_data(name, steps, gain):
    noise = torch.randn(4, 40, 40, generator=torch.Generator().manual_seed(3))
    exact = Gaussian.mean + Gaussian.std * noise  # the flow of a Gaussian scales and shifts
    samples, errors = {}, {}
    for count in (steps, 2 * steps):
        samples[count] = draw(Gaussian(), name, [0], [3], steps=count)[0]
        errors[count] = (samples[count] - exact).abs().max().item()
    assert samples[steps].mean().item() == pytest.approx(exact.mean().item(), abs=5e-3)
    assert samples[steps].std().item() == pytest.approx(exact.std().item(), abs=2e-2)
    assert errors[steps] / errors[2 * steps] == pytest.approx(gain, rel=0.15), "the order of the method"


def test_euler_steps_are_equal():
    scheduler = sampling.make_scheduler("euler", FLOW)
    sampling.set_steps(scheduler, 4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250] and scheduler.sigmas.tolist()[-1] == 0


def test_schedulers_serve_their_objective_alone():
    with pytest.raises(InputError, match="heun serves the flow objective.*trained with eps.*ddpm, ddim, dpm"):
        sampling.make_scheduler("heun", CONFIG)
    with pytest.raises(InputError, match="dpm.* serves the eps objective.*one of euler, heun"):
        sampling.make_scheduler("dpm++", FLOW)
    with pytest.raises(InputError, match="unknown scheduler 'eular'"):
        sampling.make_scheduler("eular", FLOW)
    assert isinstance(sampling.make_scheduler(None, FLOW), FlowMatchEulerDiscreteScheduler)
    assert type(sampling.make_scheduler(None, CONFIG)).__name__ == "DPMSolverMultistepScheduler"
