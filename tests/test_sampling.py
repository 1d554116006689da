import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from d_emo import sampling
from d_emo.config import InputError
from d_emo.latents import PixelCodec
from d_emo.sampling import sampler

CONFIG = DDPMScheduler(
    beta_schedule="linear", clip_sample=False, timestep_spacing="linspace", variance_type="learned_range"
).config
FLOW = FlowMatchEulerDiscreteScheduler(shift=1.0).config
CONFIGS = {"euler": FLOW, "heun": FLOW}


def draw(model, name="dpm++", labels=(1, 2, 3), seeds=(5, 6, 7), **options):
    options, scheduler = {"num_inference_steps": 4, **options}, sampling.make_scheduler(name, CONFIGS.get(name, CONFIG))
    return torch.cat(list(sampling.sample(model, scheduler, labels, seeds, **options)))


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "euler", "heun"])
def test_samples_depend_on_their_seed_and_class_not_on_their_batch(tiny_denoiser, name):
    whole = draw(tiny_denoiser, name)
    assert whole.shape == (3, 4, 8, 8) and whole.isfinite().all()
    torch.testing.assert_close(draw(tiny_denoiser, name, batch_size=2), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draw(tiny_denoiser, name, labels=[3], seeds=[7]), whole[2:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(draw(tiny_denoiser, name, seeds=[5, 6, 8])[2], whole[2], atol=1e-2)
    assert not torch.allclose(draw(tiny_denoiser, name, labels=[1, 2, 4])[2], whole[2], atol=1e-6)


def test_guidance_of_one_is_a_single_pass_and_of_zero_ignores_the_class(tiny_denoiser):
    passes = []
    tiny_denoiser.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    draw(tiny_denoiser, guidance_scale=1.0)
    assert passes == [3] * 4
    passes.clear()
    one = draw(tiny_denoiser, guidance_scale=0.0, labels=(1, 1, 1))
    assert passes == [6] * 4
    torch.testing.assert_close(one, draw(tiny_denoiser, guidance_scale=0.0, labels=(2, 3, 4)))


def test_guidance_extrapolates_the_prediction_and_keeps_the_variance(tiny_denoiser):
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.tensor([1, 2])
    with torch.no_grad():
        guided = sampler._guided(tiny_denoiser, x, t, labels, 3.0)
        given = tiny_denoiser(x, timestep=t, class_labels=labels).sample
        null = tiny_denoiser(x, timestep=t, class_labels=torch.tensor([10, 10])).sample
    torch.testing.assert_close(guided[:, :4], null[:, :4] + 3 * (given[:, :4] - null[:, :4]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[:, 4:], given[:, 4:], rtol=1e-4, atol=1e-5)


def test_classes_are_found_by_id_and_by_name():
    names = ["cat", "dog", "horse"]
    assert sampling.find_classes(["1", "horse", "cat"], names) == [1, 2, 0]
    assert sampling.find_classes(["3"], list("9876543")) == [3]  # an id goes before a name that looks like one
    assert sampling.find_classes([], ["all"]) == [0]
    with pytest.raises(InputError, match="at least one class.*3 classes"):
        sampling.find_classes([], names)
    for wrong, words in (("3", "out of range.*3 classes"), ("-1", "out of range"), ("hors", "did you mean horse")):
        with pytest.raises(InputError, match=words):
            sampling.find_classes([wrong], names)


def test_png_carries_its_settings_and_is_never_overwritten(tmp_path):
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    grid = sampling.draw_grid(images, ["0: cat", "1: dog"], 2, scale=2)
    path = sampling.free_path(None, str(tmp_path / "sub" / "grid.png"))
    sampling.save_png(grid, path, {"seed": 3})
    with Image.open(path) as picture:
        assert json.loads(picture.text["d-emo"]) == {"seed": 3}
        pixels = np.array(picture)
    assert np.array_equal(pixels[22:38:2, 4:20:2], images[0].permute(1, 2, 0).numpy())
    assert sampling.free_path(None, str(path)).name == "grid-2.png"
    with pytest.raises(InputError, match="exists already"):
        sampling.free_path(str(path), "unused.png")
    with pytest.raises(InputError, match="cannot write"):
        sampling.save_png(grid, path / "x.png", {})


def test_preview_grid_is_written(tmp_path, tiny_denoiser):
    tiny_denoiser.register_to_config(in_channels=4)

    class Codec(PixelCodec):
        def decode(self, latents):
            return latents[:, :3].clamp(-1, 1)

    sampling.preview_grid(
        tmp_path / "p.png", tiny_denoiser, scheduler_config=CONFIG, codec=Codec(), class_names=list("0123456789"),
        guidance_scale=2.0,
    )
    assert Image.open(tmp_path / "p.png").size[0] == 2 * 12 + 4


def test_the_shipped_snapshot_draws_the_ground_it_is_asked_for():
    from d_emo.checkpoint import SHIPPED_SNAPSHOT, load_denoiser
    from d_emo.data import GROUNDS
    from d_emo.latents import load_codec

    assert sum(file.stat().st_size for file in SHIPPED_SNAPSHOT.glob("**/*")) < 32e6
    snapshot = load_denoiser(SHIPPED_SNAPSHOT)
    assert snapshot.class_names[207] == "red triangle on sky"
    labels = [200 + ground for ground in range(10)]
    images = torch.cat(list(sampling.sample_images(
        snapshot.model, sampling.make_scheduler("dpm++", snapshot.scheduler_config), load_codec(snapshot.codec), labels,
        range(10), num_inference_steps=15, guidance_scale=2.0,
    ))).double()
    borders = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    palette = torch.tensor(list(GROUNDS.values())).double()
    nearest = torch.cdist(borders.median(dim=2).values, palette).argmin(dim=1)
    assert (nearest == torch.arange(10)).sum() >= 8, nearest


class Gaussian(torch.nn.Module):
    """The exact velocity at x_t = (1 - t) x_0 + t noise when the data are N(mean, std^2)."""

    config, dtype, device = SimpleNamespace(sample_size=40, in_channels=4), torch.float32, torch.device("cpu")
    y_embedder = SimpleNamespace(embedding_table=SimpleNamespace(num_embeddings=2))
    mean, std = 0.7, 0.3

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
        samples[count] = draw(Gaussian(), name, [0], [3], num_inference_steps=count)[0]
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
