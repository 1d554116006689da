import copy
import logging

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Subset

from d_emo.data import Digits
from d_emo.errors import InputError
from d_emo.latents import SHIPPED, SHIPPED_VAE, PixelCodec, VAECodec, load_codec, sample_moments


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, mid_block_add_attention=False, scaling_factor=0.5,
    )


def test_vae_codec_scales_and_shifts_both_ways(vae):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codec = VAECodec(vae, "v")
    assert (codec.channels, codec.downsample) == (4, 2)
    mean, std = codec.moments(images).chunk(2, dim=1)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.5)
    torch.testing.assert_close(std, posterior.std * 0.5)
    torch.testing.assert_close(codec.decode(mean), vae.decode(posterior.mean).sample.clamp(-1, 1))
    shifted = VAECodec(vae, "v")
    shifted.shift = 3.0
    torch.testing.assert_close(shifted.moments(images).chunk(2, dim=1)[0], (posterior.mean - 3) * 0.5)
    torch.testing.assert_close(shifted.decode(mean - 1.5), codec.decode(mean), rtol=1e-4, atol=1e-5)


def test_sampled_moments_have_the_posterior_mean_and_deviation():
    moments = torch.cat([torch.full((1, 1, 100, 100), 2.0), torch.full((1, 1, 100, 100), 0.5)], dim=1)
    drawn = sample_moments(moments, torch.randn(1, 1, 100, 100))
    assert drawn.mean().item() == pytest.approx(2, abs=0.03) and drawn.std().item() == pytest.approx(0.5, abs=0.03)


def test_pixel_codec_changes_nothing():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    codec = load_codec("pixels")
    assert isinstance(codec, PixelCodec)
    latents = sample_moments(codec.moments(images), torch.randn_like(images))
    assert torch.equal(codec.decode(latents), images)


def test_local_folders_are_opened(vae, tmp_path):
    vae.save_pretrained(tmp_path / "alone")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in ("alone", "pipeline"):
        assert load_codec(str(tmp_path / folder)).scaling == 0.5


def test_codecs_that_cannot_be_had_are_explained(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        load_codec("d-emo-f9")
    with pytest.raises(InputError, match="does not hold a readable autoencoder"):
        load_codec(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a readable autoencoder"):
        load_codec(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf download nobody/no-such-vae.*`vae` d-emo-f8"):
        load_codec("nobody/no-such-vae")


def test_a_download_that_breaks_off_is_one_sentence(monkeypatch, caplog):
    hub = logging.getLogger("huggingface_hub.file_download")
    verbosity = logging.getLogger("huggingface_hub").level

    def fetch(name, **options):
        if options["local_files_only"]:
            raise LookupError("not there")
        hub.warning("Error while downloading from https://...\nTrying to resume download...")
        raise ConnectionError("peer closed connection (received 10 bytes, expected 20)\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    with pytest.raises(InputError, match=r"broke off \(peer closed .* 20\)\)\. Run the same command again; .*`vae`"):
        load_codec("someone/vae")
    assert not caplog.records and logging.getLogger("huggingface_hub").level == verbosity
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: 1 / 0)
    with pytest.raises(InputError, match=r"could not be fetched from the Hugging Face hub \(division by zero\)\. On a"):
        load_codec("someone/vae")


def test_an_encoder_is_known_by_its_weights_not_by_its_name_or_decoder(vae):
    known, other = VAECodec(vae, "v").fingerprint, copy.deepcopy(vae)
    with torch.no_grad():
        other.decoder.conv_in.weight.add_(1)
        assert VAECodec(other, "w").fingerprint == known
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1
    assert VAECodec(other, "v").fingerprint != known


def test_the_shipped_vae_reconstructs_as_its_card_says():
    import json

    from d_emo.data import Shapes1000
    from d_emo.training.vae import psnr, squared_errors

    codec = load_codec(SHIPPED_VAE)
    claimed = json.loads((SHIPPED / SHIPPED_VAE / "psnr.json").read_text())
    assert codec.downsample == 8 and codec.channels == 4
    shapes = Subset(Shapes1000(64, num_images=1000, split="test"), range(0, 1000, 27))  # some of every shape and ground
    for name, data in (("shapes", shapes), ("digits", Subset(Digits(64, split="test"), range(0, 359, 9)))):
        found = psnr(squared_errors(codec, data, range(len(data)), torch.device("cpu")) / len(data))
        assert found > 25 and found == pytest.approx(claimed[name], abs=1.0)
