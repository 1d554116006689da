"""Codecs of one's own: autoencoders trained by the loop, stored as diffusers has them, opened wherever a codec is."""

import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from test_processes import in_processes
from test_resume import ARTEFACTS, last_state, logged, same
from torch.nn import functional as F

from d_emo.cli import train_vae
from d_emo.config import TrainSettings, VAESettings, parse_settings
from d_emo.data import Digits, Mixture, Shapes1000
from d_emo.errors import InputError
from d_emo.io.snapshot import kind_of
from d_emo.latents import SHIPPED, SHIPPED_VAE, load_codec
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.vae import VAETask, psnr

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"image_size": 16, "batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "validate_images": 8, "log_every": 1,
        "num_images": 64}  # fmt: skip
KL = {**TINY, "block_out_channels": [8, 16, 16]}
DC = {**TINY, "model": "AutoencoderDC", "block_out_channels": [8, 8, 8], "model_options": {"latent_channels": 4},
      "digits_share": 0.0, "l1_weight": 1.0, "latent_noise": 0.4, "class_weight": 0.02}  # fmt: skip


def train(folder, **options):
    settings = VAESettings(**{"output_dir": str(folder), **options})
    return fit(VAETask(settings), settings)


def test_a_run_leaves_an_autoencoder_of_diffusers_that_every_codec_setting_takes(tmp_path):
    snapshot = train(tmp_path / "run", **KL, snapshot_every=1)
    assert snapshot.name == "step-2" and (snapshot.parent / "step-1").is_dir()
    assert {"config.json", "psnr.json", "reconstructions.png"} <= {each.name for each in snapshot.iterdir()}
    stored, vae = load_file(snapshot / "diffusion_pytorch_model.safetensors"), AutoencoderKL.from_pretrained(snapshot)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    codec = load_codec(str(tmp_path / "run"))
    assert codec.name == str(snapshot) and codec.scaling == vae.config.scaling_factor != 1
    assert (codec.channels, codec.downsample) == (4, 4)
    images = torch.stack([Shapes1000(16, num_images=64)[index][0] for index in range(64)])
    mean, std = codec.moments(images).chunk(2, dim=1)
    assert (mean.var() + std.square().mean()).item() == pytest.approx(1, abs=0.1)
    claimed = json.loads((snapshot / "psnr.json").read_text())
    assert claimed.keys() == {"shapes", "digits"}
    card = (snapshot / "README.md").read_text()
    assert "library_name: diffusers" in card and f"| 8 of digits | {claimed['digits']:.2f} dB |" in card
    assert "25% of it scikit-learn's digits" in card and "CC BY 4.0" in card
    assert kind_of(tmp_path / "run") == "autoencoder"


def test_the_latents_of_deep_compression_are_normalised_in_its_last_convolution(tmp_path):
    snapshot = train(tmp_path / "run", **DC)
    vae = AutoencoderDC.from_pretrained(snapshot)
    assert vae.config.scaling_factor == 1 and not vae.config.encoder_out_shortcut
    images = torch.stack([Shapes1000(16, num_images=64)[index][0] for index in range(64)])
    with torch.no_grad():
        latents = vae.encode(images).latent
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.01)
    torch.testing.assert_close(latents.var((0, 2, 3)), torch.ones(4), rtol=0, atol=0.01)
    codec = load_codec(str(snapshot))
    torch.testing.assert_close(codec.moments(images).chunk(2, dim=1)[0], latents)


def test_the_psnr_is_that_of_what_is_stored(tmp_path):
    snapshot = train(tmp_path / "run", **{**DC, "validate_images": 10**6}, dataset="digits")
    codec, held_out = load_codec(str(snapshot)), Digits(16, split="test")
    images = torch.stack([held_out[index][0] for index in range(len(held_out))])
    error = F.mse_loss(codec.decode(codec.moments(images)[:, :4]), images).item()
    claimed = json.loads((snapshot / "psnr.json").read_text())
    assert claimed == {"digits": pytest.approx(psnr(error), abs=0.01)} and psnr(0.04) == pytest.approx(20)


def test_the_loss_is_the_sum_of_its_parts():
    settings = VAESettings(**{**DC, "max_steps": 100})
    task = VAETask(settings)
    assert (task.places, task.base, task.model.head.out_features) == ([100, 10, 1], 10, 30)
    images, labels = torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 123, 999, 507])
    draws = task.draw(torch.Generator().manual_seed(0), 4)
    losses = task.loss(task.model, [images, labels], draws)
    total = losses["mse"] + losses["l1"] + 0.02 * losses["cross_entropy"]
    torch.testing.assert_close(losses["loss"], total)
    given = task.model(images, draws.posterior, None)  # no noise at the first step
    torch.testing.assert_close(losses["mse"], F.mse_loss(given["images"], images))
    logits, parts = given["logits"].unflatten(1, (3, 10)), [(0, 0, 0), (1, 2, 3), (9, 9, 9), (5, 0, 7)]
    each = sum(F.cross_entropy(logits[:, part], torch.tensor(parts)[:, part]) for part in range(3))
    torch.testing.assert_close(losses["cross_entropy"], each)
    seen = []
    for task.step in (0, 6, 15, 99):
        task.loss(lambda *args: seen.append(args[2]) or given, [images, labels], draws)
    for noise, level in zip(seen, (0, 0.16, 0.4, 0.4), strict=True):  # full after 15 of 100 steps
        torch.testing.assert_close(noise, level * draws.noise)
    assert draws.noise.std((1, 2, 3)).std() > 0.5  # an image has a level of its own


def test_the_step_of_a_run_reaches_the_loss_also_of_one_that_goes_on(tmp_path, monkeypatch):
    seen, plain = [], VAETask.loss
    monkeypatch.setattr(VAETask, "loss", lambda self, *args: seen.append(self.step) or plain(self, *args))
    train(tmp_path / "run", **DC)
    train(tmp_path / "run", **{**DC, "max_steps": 3})
    assert seen == [0, 0, 1, 1, 2, 2]  # two micro-batches each


def test_noise_reaches_decoder_and_head_in_units_of_the_latents():
    for options, unit in ((KL | {"latent_noise": 0.4}, None), (DC, 1.0)):
        model, seen = VAETask(VAESettings(**options)).model, []
        model.vae.decoder.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        model.vae.post_quant_conv = torch.nn.Identity()
        images, noise = torch.rand(4, 3, 16, 16), torch.randn(4, 4, 4, 4)
        with torch.no_grad():
            plain, noisy = (model(images, torch.zeros_like(noise), each) for each in (None, noise))
        spread = unit or seen[0].std((1, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(seen[1] - seen[0], noise * spread, rtol=1e-4, atol=1e-5)
        assert "logits" not in plain or not torch.equal(plain["logits"], noisy["logits"])


def test_reconstructions_are_compared_in_the_features_of_a_classifier(tmp_path):
    options = {**KL, "perceptual_features": f"emov2:{ARTEFACTS / 'classifier'}", "perceptual_weight": 0.5}
    task = VAETask(VAESettings(**options))
    first, second = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    assert 0 <= task.perceptual(first, first) < 1e-9 < 1e-3 < task.perceptual(first, second)
    network, side = task.perceptual.network, task.perceptual.side
    maps = [network.forward_intermediates(F.interpolate(each, (side, side), mode="bilinear", antialias=True), indices=4,
                                          norm=True, intermediates_only=True) for each in (first, second)]  # fmt: skip
    cosines = [F.cosine_similarity(one, two, dim=1).mean() for one, two in zip(*maps, strict=True)]
    torch.testing.assert_close(task.perceptual(first, second), 2 - 2 * sum(cosines) / 4)
    draws = task.draw(torch.Generator().manual_seed(0), 2)
    losses = task.loss(task.model, [first, torch.zeros(2, dtype=torch.long)], draws)
    total = losses["mse"] + 0.5 * losses["perceptual"] + 1e-4 * losses["kl"]
    torch.testing.assert_close(losses["loss"], total)
    torch.autograd.grad(losses["perceptual"], task.model.vae.decoder.conv_in.weight)
    assert all(not each.requires_grad for each in network.parameters())
    with pytest.raises(InputError, match="`perceptual_features` inception passes no gradients"):
        VAETask(VAESettings(**{**options, "perceptual_features": "inception"}))
    card = (train(tmp_path, **options) / "README.md").read_text()
    assert "distance in the features of emov2:classifier of weight 0.5" in card


def test_the_posterior_is_drawn_from_and_kept_near_a_normal_one():
    task = VAETask(VAESettings(**KL, kl_weight=0.5))
    images, batch = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    draws = task.draw(torch.Generator().manual_seed(0), 4)
    posterior = task.model.vae.encode(images).latent_dist
    latents, parts = task.model.latents(images, draws.posterior)
    torch.testing.assert_close(latents, posterior.mean + posterior.std * draws.posterior)
    losses = task.loss(task.model, [images, batch], draws)
    torch.testing.assert_close(losses["kl"], posterior.kl().mean() / (4 * 4 * 4))
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * losses["kl"])


@pytest.mark.parametrize("options", [KL, DC])
def test_a_run_that_was_killed_ends_as_one_that_was_not(options, tmp_path):
    def run(rank, name="parts"):
        train(tmp_path / name, **{**options, "max_steps": 4}, state_every=2)

    def killed(rank):
        from d_emo.training import loop

        done = loop.Progress.step_done

        def die(self, step, figures):
            done(self, step, figures)
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        loop.Progress.step_done = die
        run(rank)

    assert in_processes(1, killed) == [-signal.SIGKILL]
    assert in_processes(1, run) == in_processes(1, partial(run, name="whole")) == [0]  # as many threads as the killed
    assert same(last_state(tmp_path / "parts", 4), last_state(tmp_path / "whole", 4))
    files = [(tmp_path / name / "snapshots/step-4/diffusion_pytorch_model.safetensors").read_bytes()
             for name in ("whole", "parts")]  # fmt: skip
    assert files[0] == files[1]


@pytest.mark.parametrize("options", [KL, DC | {"sync_batchnorm": True}])
def test_two_processes_train_as_one_does(options, tmp_path):
    options = {**options, "batch_size": 8, "micro_batch_size": 8, "max_steps": 3, "validate_every": 3}
    train(tmp_path / "one", **options)
    assert in_processes(2, lambda rank: train(tmp_path / "two", **options)) == [0, 0]
    for name in ("mse", "validation_psnr_shapes"):
        one, two = (logged(tmp_path / run, name) for run in ("one", "two"))
        assert one and two == pytest.approx(one, rel=1e-3)


def test_a_folder_may_be_flat_unless_classes_are_asked_for(tmp_path, photos):
    flat = {**KL, "data_dir": str(photos / "train" / "ant"), "output_dir": str(tmp_path / "run")}
    task = VAETask(VAESettings(**flat))
    assert task.settings.digits_share == 0 and task.measured_on == {} and task.dataset.flip
    snapshot = train(tmp_path / "run", **flat)
    assert not (snapshot / "psnr.json").exists()
    assert Image.open(snapshot / "reconstructions.png").size == (6 * 132 + 4, 2 * 132 + 4)  # of three images
    assert "Images above their reconstructions" in (snapshot / "README.md").read_text()
    with pytest.raises(InputError, match="has no sub-folders"):
        VAETask(VAESettings(**flat, class_weight=0.1))
    task = VAETask(VAESettings(**{**KL, "data_dir": str(photos / "train"), "validate_dir": str(photos / "val"),
                                 "class_weight": 0.1}))  # fmt: skip
    assert (task.places, task.base) == ([1], 2) and [len(each) for each in task.measured_on.values()] == [6]


@pytest.mark.parametrize(("options", "words"), [
    ({"image_size": 18}, "`image_size` 18 is not a multiple of 4, which the codec AutoencoderKL needs"),
    ({"block_out_channels": [12, 16]}, "`block_out_channels` must be multiples of 8"),
    ({"block_out_channels": []}, "`block_out_channels` must be 1 to 14 numbers"),
    ({"model_options": {"a": 1}}, "`model_options` {'a': 1} with .* make no AutoencoderKL .*argument 'a'"),
    ({"model_options": {"layers_per_block": 10**9}}, "layers_per_block must be at .* at most 1000"),
    ({"model_options": {"latent_channels": 10**7}}, "has weights of [0-9,]+ GB"),
    ({"model_options": {"scaling_factor": 2.0}}, "`model_options`: scaling_factor is no choice"),
    ({"model": "AutoencoderDC", "model_options": {"latent_channels": 5}},
     "the last of `block_out_channels` is 16, but must be a multiple of the 5 latent_channels, .* `model_options`"),
    ({"model": "AutoencoderDC", "model_options": {"latent_channels": "x"}}, "latent_channels must be a whole number"),
    ({"model": "AutoencoderDC", "kl_weight": 5.0}, "`kl_weight` 5 is for AutoencoderKL; .* leave it away"),
    ({"perceptual_weight": 3.0}, "`perceptual_weight` 3 is for distances in `perceptual_features`; name these"),
    ({"model": "AutoencoderRAE"}, "`model` must be one of AutoencoderKL, AutoencoderDC"),
    ({"dataset": "digits", "digits_share": 0.5}, "`digits_share` 0.5 belongs to the built-in shapes"),
    ({"data_dir": "x", "digits_share": 0.5}, "`digits_share` 0.5 belongs to the built-in shapes"),
])  # fmt: skip
def test_what_makes_no_codec_is_refused_in_a_sentence(options, words):
    with pytest.raises(InputError, match=words):
        VAETask(VAESettings(**{**KL, **options}))


def test_a_dry_run_tells_of_the_data_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_vae.run(VAESettings(**DC, dry_run=True))
    said = capsys.readouterr().out
    assert "AutoencoderDC: 0.01 M trained parameters, latents 4 x 4 x 4 of 16 px; 64 images of shapes" in said
    assert "s a step of 4 images" in said
    assert [each.name for each in tmp_path.rglob("*.png")] == ["dry-run-AutoencoderDC-shapes-16.png"]


def test_held_out_images_that_cannot_be_read_are_told_before_the_run(tmp_path, photos):
    for place in (photos / "val").rglob("*.png"):
        place.write_text("no image")
    with pytest.raises(InputError, match="cannot read the image .*val/ant/0.png"):
        VAETask(VAESettings(**KL, data_dir=str(photos / "train"), validate_dir=str(photos / "val")))


def test_a_run_without_a_snapshot_is_no_codec_yet(tmp_path):
    (tmp_path / "states").mkdir()
    with pytest.raises(InputError, match="the run .* has no snapshot yet"):
        load_codec(str(tmp_path))


def test_the_settings_of_the_shipped_vae_make_such_a_one():
    settings = parse_settings(VAESettings, "", ["--config", str(SHIPPED / SHIPPED_VAE / "config.yaml")])
    assert (settings.digits_share, settings.max_steps, settings.warmup_steps) == (0.25, 6000, 300)
    task, shipped = VAETask(settings), load_codec(SHIPPED_VAE).vae
    own = task.model.vae.state_dict()
    assert {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in shipped.state_dict().items()
    }
    here, there = (json.loads(vae.to_json_string()) for vae in (task.model.vae, shipped))
    assert {key for key, value in there.items() if key[0] != "_" and here[key] != value} == {"scaling_factor"}


def test_the_config_of_deep_compression_is_the_network_that_it_says():
    config = Path(__file__).parents[1] / "configs" / "shapes128_f32.yaml"
    settings = parse_settings(VAESettings, "", ["--config", str(config), "--image-size", "32"])
    task = VAETask(settings)
    assert task.latent_shape == (32, 1, 1) and yaml.safe_load(config.read_text())["image_size"] == 128
    layers = {"layers_per_block": (0, 1, 1, 2, 2, 2), "qkv_multiscales": ((),) * 6}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in layers.items()}
    meant = AutoencoderDC(
        latent_channels=32, encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_out_shortcut=False,
        encoder_block_out_channels=(16, 16, 32, 64, 128, 256), decoder_block_out_channels=(24, 24, 48, 96, 128, 256),
        **sides,
    )  # fmt: skip
    shapes = [{name: value.shape for name, value in vae.state_dict().items()} for vae in (meant, task.model.vae)]
    assert shapes[0] == shapes[1] and task.model.vae.encoder.out_shortcut is False


def test_deep_compression_is_a_thirty_second_of_the_side_unless_channels_are_given():
    settings = VAESettings(model="AutoencoderDC").resolve()
    assert len(settings.block_out_channels) == 6 and settings.image_size == 64
    assert len(VAESettings().resolve().block_out_channels) == 4


def test_a_mixture_has_the_share_that_it_says_and_its_classes_last():
    first, second = Shapes1000(8, num_images=100), Digits(8)
    mixed = Mixture(first, second, 0.25)
    labels = [mixed.label(index) for index in range(len(mixed))]
    assert len(mixed) == 100 and sum(label >= 1000 for label in labels) == 25
    index = next(index for index, label in enumerate(labels) if label >= 1000)
    assert mixed[index][1] == labels[index] and mixed.class_names[labels[index]] == str(second.label(0))
    assert torch.equal(mixed[index][0], second[0][0]) and torch.equal(mixed[0][0], first[0][0])


def test_an_autoencoder_of_others_is_no_run_folder_and_stays_what_it_is(tmp_path):
    shutil.copytree(SHIPPED / SHIPPED_VAE, old := tmp_path / "old")
    before = load_codec(str(old)).fingerprint
    with pytest.raises(InputError, match="is no run folder and is not overwritten"):
        train(old, **KL)
    assert not (old / "states").exists()
    (old / "states").mkdir()
    assert load_codec(str(old)).fingerprint == before


def test_run_folders_of_codecs_are_named_after_network_and_data():
    names = [VAESettings(**options).resolve(**facts).output_dir for options, facts in (
        ({}, {}), ({"data_dir": "a/pets", "image_size": 256}, {}), ({"dataset": "digits", **DC}, {}),
        ({"init_from": "x", "data_dir": "flowers"}, {"model": "AutoencoderDC", "image_size": 32}),
    )]  # fmt: skip
    assert names == [f"results/Autoencoder{each}" for each in ("KL-shapes-64", "KL-pets-256", "DC-digits-16",
                                                              "DC-flowers-32")]  # fmt: skip


def test_a_run_keeps_the_snapshots_that_its_run_folders_stood_for(tmp_path):
    first = train(tmp_path / "vae", **KL)
    classifier = tmp_path / "classifier" / "snapshots" / "step-1"
    shutil.copytree(ARTEFACTS / "classifier", classifier)
    task = VAETask(VAESettings(**KL, perceptual_features=f"emov2:{tmp_path / 'classifier'}"))
    assert task.settings.perceptual_features == f"emov2:{classifier}"
    options = {"vae": str(tmp_path / "vae"), "image_size": 16, "num_images": 64, "model": "D-EMOv2-Ti-2"}
    settings = TrainSettings(**options, output_dir=str(tmp_path / "run"), batch_size=2, max_steps=1, tracker="none")
    fit(DenoiserTask(settings), settings)
    later = shutil.copytree(first, first.with_name("step-3"))
    settings = replace(settings, max_steps=2)  # the same command goes on
    task = DenoiserTask(settings)
    fit(task, settings)
    assert task.codec.name == str(first) == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["vae"]
    settings = replace(settings, vae=str(later))
    with pytest.raises(InputError, match=f"vae was {first}, now {later}.*; give what it had"):
        fit(DenoiserTask(settings), settings)


def test_a_codec_that_is_not_what_was_written_is_refused(tmp_path):
    snapshot = train(tmp_path, **KL)
    for file, old, new in (("diffusion_pytorch_model.safetensors", None, None),
                           ("config.json", '"scaling_factor": ', '"scaling_factor": 1')):  # fmt: skip
        content = (path := snapshot / file).read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if old is None
                         else content.replace(old.encode(), new.encode()))  # fmt: skip
        with pytest.raises(InputError, match=f"the checksum of {file} is not the one in snapshot.json"):
            load_codec(str(tmp_path))
        path.write_bytes(content)
    assert load_codec(str(tmp_path)).name == str(snapshot)
