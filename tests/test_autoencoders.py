"""Codecs over autoencoders without a posterior: AutoencoderDC and AutoencoderRAE of diffusers."""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderDC
from test_weights import snapshot

from d_emo import DEMOPipeline
from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.io.snapshot import load_denoiser
from d_emo.latents import LatentDataset, encode, latent_side, load_codec
from d_emo.sampling import Sampler
from d_emo.training.denoiser import DenoiserTask


def tiny_dc(**config) -> AutoencoderDC:
    torch.manual_seed(0)
    parts = {"block_types": ("ResBlock",) * 3, "block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1),
             "qkv_multiscales": ((),) * 3}  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in parts.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, **sides, **config).eval()


def tiny_rae(**config) -> torch.nn.Module:
    pytest.importorskip("transformers")
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    return AutoencoderRAE(
        encoder_type="dinov2", encoder_hidden_size=64, encoder_patch_size=14, encoder_num_hidden_layers=1,
        encoder_input_size=28, patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=16, **config,
    ).eval()  # fmt: skip


def check_everywhere(tmp_path, codec, folder, size):
    """Latents, training, sampling and the pipeline apply a codec alike."""
    settings = {"model": "D-EMOv2-Ti-1", "model_options": {"depth": 1, "hidden_size": 16, "num_heads": 1},
                "dataset": "digits", "image_size": size, "output_dir": str(tmp_path / "run")}  # fmt: skip
    task = DenoiserTask(TrainSettings(**settings, vae=folder))
    side = size // codec.downsample
    assert task.model.latent_shape == (codec.channels, side, side)
    encode(task.images, codec, tmp_path / "latents", device=torch.device("cpu"), dtype="float32", batch_size=500)
    stored = LatentDataset(tmp_path / "latents")
    torch.testing.assert_close(stored[0][0], codec.moments(task.images[0][0][None])[0], rtol=1e-4, atol=1e-5)
    opened = load_denoiser(snapshot(tmp_path / "snapshot", task.model.eval(), folder, size))
    pipe = DEMOPipeline.from_snapshot(opened)
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = DEMOPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe([3], 1.0, 2, torch.Generator().manual_seed(5), output_type="pt").images
    sampled = torch.cat(list(Sampler.open(opened, steps=2, guidance=1.0).images([3], [5])))
    torch.testing.assert_close(drawn * 255, sampled.float(), rtol=0, atol=0.6)


def test_deep_compression_is_applied_alike_everywhere(tmp_path):
    vae, folder = tiny_dc(scaling_factor=0.4), str(tmp_path / "vae")
    vae.save_pretrained(folder)
    codec = load_codec(folder)
    assert (codec.downsample, codec.channels, codec.scaling, codec.shift) == (4, 4, 0.4, 0.0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(images).latent
        mean, std = codec.moments(images).chunk(2, dim=1)
        torch.testing.assert_close(mean, latents * 0.4)
        assert not std.any()
        torch.testing.assert_close(codec.decode(mean), vae.decode(latents).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    check_everywhere(tmp_path, codec, folder, 16)


def test_representations_are_applied_alike_everywhere_and_have_one_size(tmp_path):
    channels = {"latents_mean": torch.linspace(-1, 1, 64).reshape(64, 1, 1), "latents_std": torch.full((64, 1, 1), 2.0)}
    vae, folder = tiny_rae(**channels), str(tmp_path / "vae")
    vae.save_pretrained(folder)
    codec = load_codec(folder)
    assert (codec.downsample, codec.channels, codec.scaling, codec.shift) == (8, 64, 1.0, 0.0)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.manual_seed(0)
        latents = vae.encode((images + 1) / 2).latent
        torch.manual_seed(0)
        mean, std = codec.moments(images).chunk(2, dim=1)
        torch.testing.assert_close(mean, latents)
        assert not std.any()
        decoded = (vae.decode(latents).sample * 2 - 1).clamp(-1, 1)
        torch.testing.assert_close(codec.decode(mean), decoded, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="is for images of 16 px; give `image_size` 16"):
        latent_side(codec, 32)
    check_everywhere(tmp_path, codec, folder, 16)


def test_what_cannot_be_used_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    tiny_dc(in_channels=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="takes images of 1 channels"):
        load_codec(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, words in (
        ({"encoder_layers_per_block": [1, 1, 10**9]}, "a readable autoencoder: .* encoder_layers_per_block must be at"),
        ({"_class_name": "AutoencoderRAE"}, "AutoencoderRAE needs transformers: pip install 'transformers'"),
        ({"_class_name": "AutoencoderOobleck"}, "holds AutoencoderOobleck, not AutoencoderKL or AutoencoderDC or"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(InputError, match=words):
            load_codec(str(tmp_path))
