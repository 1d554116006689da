"""Codecs that go on from others: whole, or with the latents that they had and a decoder that is trained on."""

import json

import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import load_file
from test_resume import last_state, same
from test_vae_training import DC, KL, TINY, train
from torch.nn import functional as F

from d_emo.cli import train_vae
from d_emo.config import VAESettings, parse_settings
from d_emo.config.base import in_flags
from d_emo.data import spread
from d_emo.errors import InputError
from d_emo.io.snapshot import load_meta
from d_emo.latents import load_codec, sample_moments
from d_emo.latents.codec import DECODER
from d_emo.training.vae import VAETask, psnr

pytestmark = pytest.mark.usefixtures("one_thread")
RUN = {**TINY, "image_size": None}


@pytest.fixture(scope="module", params=[KL, DC], ids=["KL", "DC"])
def start(request, tmp_path_factory):
    """A snapshot of train-vae."""
    return train(tmp_path_factory.mktemp("start") / "run", **request.param)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """An autoencoder of others: weights in float32, latents shifted and scaled by channel."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
    )
    vae.encoder.conv_in.weight.data[0] = -0.0  # which a sum with zeros would make 0.0, with another fingerprint
    vae.save_pretrained(folder := tmp_path_factory.mktemp("foreign"))
    return folder


def weights(snapshot, *, decoder):
    stored = load_file(snapshot / "diffusion_pytorch_model.safetensors")
    return {name: value for name, value in stored.items() if name.startswith(DECODER) == decoder}


def images_of(task, count=8):
    return torch.stack([task.dataset[index][0] for index in range(count)])


def test_a_decoder_is_trained_for_the_latents_that_there_were(start, tmp_path):
    more = {"init_from": str(start.parents[1]), "train": "decoder", "latent_noise": 0.4, "learning_rate": 1e-3}
    made = train(tmp_path / "run", **RUN, **more)
    old, new = load_codec(str(start)), load_codec(str(made))
    assert new.fingerprint == old.fingerprint and (new.scaling, new.shift) == (old.scaling, old.shift)
    kept, trained = ([weights(each, decoder=part) for each in (start, made)] for part in (False, True))
    assert same(*kept) and {value.dtype for value in trained[1].values()} == {torch.float16}
    assert all(not torch.equal(trained[0][name], value) for name, value in trained[1].items())
    images = images_of(VAETask(VAESettings(**RUN)))
    assert torch.equal(new.moments(images), old.moments(images))
    config = yaml.safe_load((made / "config.yaml").read_text())
    assert config["init_from"] == str(start) and config["image_size"] == 16 and config["kl_weight"] is None
    before = yaml.safe_load((start / "config.yaml").read_text())
    assert all(config[name] == before[name] for name in ("model", "block_out_channels", "model_options"))
    meta = json.loads((made / "snapshot.json").read_text())
    assert meta["started_from"]["step"] == 2
    assert meta["parameters"] == sum(value.numel() for each in (kept, trained) for value in each[0].values())
    card = (made / "README.md").read_text()
    assert f"| start | the weights of `{start}` (2 steps, " in card
    assert "the decoder alone was trained, latents are those of the start |" in card and "weights in float16" in card
    assert "Kullback" not in card


def test_the_encoder_has_no_part_in_the_training_of_a_decoder(start, foreign):
    for folder in (start, foreign):
        task = VAETask(VAESettings(**RUN, init_from=str(folder), train="decoder", latent_noise=0.4))
        model, codec, seen, images = task.model.train(), load_codec(str(folder)), [], images_of(task, 4)
        model.vae.decoder.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        if getattr(model.vae, "post_quant_conv", None):
            model.vae.post_quant_conv = torch.nn.Identity()
        draws = task.draw(torch.Generator().manual_seed(0), 4)
        task.step = task.settings.max_steps  # noise in full
        losses = task.loss(model, [images, torch.zeros(4)], draws._replace(flip=torch.zeros(4, dtype=torch.bool)))
        assert losses.keys() == {"loss", "mse", "l1"} and not seen[0].requires_grad
        scaled = sample_moments(codec.moments(images), draws.posterior) + 0.4 * draws.noise
        scaling, shift = (torch.tensor(each).reshape(-1, 1, 1) for each in (codec.scaling, codec.shift))
        torch.testing.assert_close(seen[0], scaled / scaling + shift)
        trained = {name for name, parameter in model.vae.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in model.vae.named_parameters() if name.startswith(DECODER)}
        losses["loss"].backward()
        graded = {name for name, parameter in model.vae.named_parameters() if parameter.grad is not None}
        assert graded == {name for name, _ in model.vae.named_parameters() if name.startswith("decoder.")}


def test_an_encoder_that_float16_does_not_hold_is_stored_as_it_was(foreign, tmp_path):
    made = train(tmp_path / "run", **RUN, init_from=str(foreign), train="decoder", ema_warmup=False)
    assert load_codec(str(made)).fingerprint == load_codec(str(foreign)).fingerprint
    assert same(weights(made, decoder=False), weights(foreign, decoder=False))
    config, there = (json.loads((folder / "config.json").read_text()) for folder in (made, foreign))
    assert config == there and VAETask(VAESettings(**RUN, init_from=str(made))).settings.image_size == 8
    codec, meta = load_codec(str(made)), json.loads((made / "snapshot.json").read_text())
    assert "started_from" not in meta and "weights in float32" in (made / "README.md").read_text()
    (name, claimed), *_ = meta["psnr"].items()
    held_out = VAETask(VAESettings(**RUN, init_from=str(made), train="decoder")).measured_on[name]
    images = torch.stack([held_out[index][0] for index in spread(len(held_out), 8)])
    error = F.mse_loss(codec.decode(codec.moments(images).chunk(2, dim=1)[0]), images).item()
    assert claimed == pytest.approx(psnr(error), abs=0.01)


def goes_on_whole(folder, run):
    made = train(run, **RUN, init_from=str(folder), learning_rate=1e-9)
    new, task = load_codec(str(made)), VAETask(VAESettings(**RUN, init_from=str(folder)))
    mean, std = new.moments(images_of(task, 64)).chunk(2, dim=1)
    assert (mean.var() + std.square().mean()).item() == pytest.approx(1, abs=0.1)
    assert new.shift == 0 and isinstance(new.scaling, float)
    near = [weights(each, decoder=True)["decoder.conv_in.weight"].float() for each in (folder, made)]
    torch.testing.assert_close(*near, rtol=1e-3, atol=1e-4)


def test_a_whole_codec_goes_on_from_its_weights_with_latents_measured_anew(start, tmp_path):
    goes_on_whole(start, tmp_path)


def test_a_whole_codec_of_others_goes_on_with_a_factor_of_its_own(foreign, tmp_path):
    goes_on_whole(foreign, tmp_path)


def test_a_run_that_starts_from_a_codec_ends_the_same_in_two_parts(start, tmp_path):
    options = {**RUN, "init_from": str(start), "latent_noise": 0.4, "schedule": "constant", "warmup_steps": 0}
    kind = load_meta(start, "autoencoder")["model"]["name"]
    options["train"] = {"AutoencoderKL": "decoder", "AutoencoderDC": "all"}[kind]
    for steps, name in ((3, "whole"), (2, "parts"), (3, "parts")):
        train(tmp_path / name, **{**options, "max_steps": steps})
    assert same(last_state(tmp_path / "whole", 3), last_state(tmp_path / "parts", 3))


@pytest.mark.parametrize(("options", "words"), [
    ({"model": "AutoencoderDC"}, "is another network .model is AutoencoderKL there, AutoencoderDC here.; --model, "),
    ({"block_out_channels": [4, 16]}, r"is another network .block_out_channels is \[4, 8\] there, \[4, 16\] here"),
    ({"model_options": {"latent_channels": 8, "layers_per_block": 1}}, "latent_channels is 4 there, 8 here.; "),
    ({"init_from": "pixels"}, "--init-from pixels has no weights; give an AutoencoderKL or AutoencoderDC"),
    ({"init_from": "no/such/vae"}, "the VAE 'no/such/vae' does not exist"),
    ({"init_from": None}, "--train decoder needs trained weights; name a snapshot with --init-from"),
    ({"train": "head"}, "--train must be one of all, decoder, not head"),
    ({"kl_weight": 0.1}, "--kl-weight 0.1 is for the encoder, which --train decoder keeps; leave it away"),
    ({"class_weight": 0.1}, "--class-weight 0.1 is for the encoder, which --train decoder keeps; leave it away"),
    ({"image_size": 9}, "--image-size 9 is not a multiple of 2"),
])  # fmt: skip
def test_what_a_codec_cannot_start_from_is_refused_in_a_sentence(options, words, foreign):
    with pytest.raises(InputError, match=words), in_flags(VAESettings):
        VAETask(VAESettings(**{**RUN, "init_from": str(foreign), "train": "decoder", **options}))


def test_deep_compression_of_others_keeps_its_latents(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderDC(latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 16),
                        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), scaling_factor=0.5,
                        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()))  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    options = {**TINY, "init_from": str(tmp_path / "vae")}
    with pytest.raises(InputError, match="has encoder_out_shortcut True, scaling_factor 0.5, so .* decoder"):
        VAETask(VAESettings(**options))
    task = VAETask(VAESettings(**options, train="decoder"))
    assert task.settings.model_options == {"latent_channels": 4, "decoder_block_out_channels": [8, 16]}
    assert task.finished(task.model).config.encoder_out_shortcut is True


def test_a_dry_run_says_what_it_starts_from_and_trains(start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--init-from", str(start), "--train", "decoder", "--dry-run", "--batch-size", "2", "--num-images", "64"]
    there = yaml.safe_load((start / "config.yaml").read_text())
    flags += ["--block-out-channels", *map(str, there["block_out_channels"])]
    train_vae.run(parse_settings(VAESettings, "", flags))
    said = capsys.readouterr().out
    assert f"Weights from {start} (step 2)." in said and "decoder: " in said and "trainable parameters, " in said


def test_a_codec_below_the_home_folder_is_known_with_what_its_snapshot_says(start, monkeypatch):
    monkeypatch.setenv("HOME", str(start.parent))
    task = VAETask(VAESettings(**RUN, init_from=f"~/{start.name}"))
    assert task.started_from["step"] == 2 and task.settings.image_size == 16
