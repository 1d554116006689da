"""Guidance by a weaker snapshot of the same data (autoguidance)."""

import copy
import json

import pytest
import torch
from PIL import Image

from d_emo.cli import run_verb
from d_emo.config import AppSettings, FidSettings, SampleSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import SHIPPED_SNAPSHOT, load_denoiser
from d_emo.models import create_model
from d_emo.objective import FlowObjective
from d_emo.sampling import Guidance, Sampler, make_scheduler
from d_emo.sampling.guidance import check_guide, guided
from d_emo.sampling.pipeline import DEMOPipeline


@pytest.fixture
def weaker():
    """A smaller denoiser of the same latents and classes."""
    torch.manual_seed(1)
    model = create_model("DiT-Ti-2", depth=1, hidden_size=24, num_heads=1, sample_size=8, num_classes=10)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model.eval()


def test_autoguidance_is_karras_equation_and_adds_to_that_by_classes(tiny_denoiser, weaker):
    """Karras et al., 2024, eq. 4: D_w = w D_1 + (1 - w) D_0."""
    generator = torch.Generator().manual_seed(0)
    x, t, labels = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(400), torch.tensor([1, 2])
    with torch.no_grad():
        one = tiny_denoiser(x, timestep=t, class_labels=labels).sample
        null = tiny_denoiser(x, timestep=t, class_labels=torch.tensor([10, 10])).sample[:, :4]
        zero = weaker(x, timestep=t, class_labels=labels).sample[:, :4]
        alone = guided(tiny_denoiser, x, t, labels, 1.0, guide=weaker, weight=3.0)
        both = guided(tiny_denoiser, x, t, labels, 2.5, guide=weaker, weight=3.0)
        three = guided(tiny_denoiser, x, t, labels, 2.5, "3", guide=weaker, weight=3.0)
    expected = 3.0 * one[:, :4] + (1 - 3.0) * zero
    torch.testing.assert_close(alone, torch.cat([expected, one[:, 4:]], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[:, :4], expected + 1.5 * (one[:, :4] - null), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(three[:, :3], both[:, :3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(three[:, 3:], one[:, 3:], rtol=1e-4, atol=1e-5)
    assert torch.equal(guided(tiny_denoiser, x, t, labels, 2.5, guide=weaker), guided(tiny_denoiser, x, t, labels, 2.5))


def test_outside_of_the_interval_nobody_guides(tiny_denoiser, weaker):
    asked = []
    weaker.register_forward_pre_hook(lambda module, args: asked.append(1))
    config = FlowObjective(null_class=10).noise_schedule().config
    pipe = DEMOPipeline(tiny_denoiser, make_scheduler("euler", config))
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "latents": torch.randn(1, 4, 8, 8), "output_type": "latent"}
    plain = pipe([1], guidance_scale=1.0, **options).images
    assert torch.equal(pipe([1], guide=weaker, guide_weight=1.0, **options).images, plain) and not asked
    assert not torch.equal(pipe([1], guide=weaker, guidance_interval=(0.25, 0.65), **options).images, plain)
    assert len(asked) == 4  # at 0.6, 0.5, 0.4 and 0.3
    other = create_model("DiT-Ti-2", depth=1, hidden_size=24, num_heads=1, sample_size=8, num_classes=3)
    with pytest.raises(InputError, match="the guide takes latents and classes .*, 3"):
        pipe([1], guide=other, **options)


def test_sample_draws_by_a_snapshot_and_writes_down_which(tmp_path, monkeypatch, capsys):
    """The shipped one guided by itself is itself; a guide changes nothing that is drawn without it."""
    monkeypatch.chdir(tmp_path)
    flags = ["--class", "207", "--num-images", "1", "--steps", "2", "--guidance-scale", "1"]
    run_verb("sample", [*flags, "--output", "plain.png"])
    run_verb("sample", [*flags, "--guide", str(SHIPPED_SNAPSHOT), "--guide-weight", "3", "--output", "guided.png"])
    assert f"guidance 1, guided by {SHIPPED_SNAPSHOT} (weight 3)" in capsys.readouterr().out
    plain, guided_by_itself = (Image.open(f"{name}.png") for name in ("plain", "guided"))
    assert list(plain.getdata()) == list(guided_by_itself.getdata())
    assert json.loads(guided_by_itself.text["d-emo"])["guide_weight"] == 3
    snapshot, weaker = load_denoiser(SHIPPED_SNAPSHOT), load_denoiser(SHIPPED_SNAPSHOT)
    with torch.no_grad():
        weaker.model.final_layer.linear.weight.mul_(0.9)
    sampler = Sampler.open(snapshot, steps=2, guide=weaker, device="cpu")
    assert sampler.guidance == Guidance(1.0, weight=2.0)
    drawn, before = next(sampler.images([207], [0])), next(Sampler.open(steps=2, guidance=1.0).images([207], [0]))
    assert not torch.equal(drawn, before)
    unguided = sampler.replace(guidance=Guidance(1.0, weight=1.0))
    assert torch.equal(next(unguided.images([207], [0])), before)


@pytest.mark.parametrize("what", ["objective", "codec", "class 998", "number of classes", "noise schedule"])
def test_a_snapshot_that_means_something_else_is_refused(what):
    snapshot, other = load_denoiser(SHIPPED_SNAPSHOT), load_denoiser(SHIPPED_SNAPSHOT)
    check_guide(other, snapshot)
    other.meta, other.scheduler_config = copy.deepcopy(other.meta), dict(other.scheduler_config)
    if what == "objective":
        other.meta["objective"] = "eps"
    elif what == "codec":
        other.codec = "pixels"
    elif what == "noise schedule":
        other.scheduler_config["num_train_timesteps"] = 500
    else:
        names = other.class_names
        other.class_names = [*names[:-2], names[-1], names[-2]] if what == "class 998" else names[1:]
    with pytest.raises(InputError, match=f"`guide` .* cannot guide .*: (the )?{what} .* there, .* here"):
        check_guide(other, snapshot)


def test_wrong_combinations_are_refused_in_words():
    for kind, rest in ((SampleSettings, {}), (AppSettings, {}), (FidSettings, {"checkpoint": "x", "reference": "y"})):
        with pytest.raises(InputError, match="`guide_weight` 2 needs a snapshot to guide by"):
            kind(guide_weight=2.0, **rest)
    assert Guidance.of(SampleSettings(guide="g", guide_weight=1.5, guidance_scale=[1.0])).weight == 1.5
    with pytest.raises(InputError, match="`interpolate` mixes classes that `guide` does not know"):
        SampleSettings(interpolate=["a", "b"], guide="g")
    with pytest.raises(InputError, match="`guide` is for images drawn from a `checkpoint` only"):
        FidSettings(samples="x", reference="y", guide="g")
    assert SampleSettings(guide="g").resolve(objective="flow", label_dropout=0.1).guidance_scale == [1.0]
