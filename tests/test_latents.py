import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Subset

from d_emo.config import InputError
from d_emo.data import Digits, ImageFolder
from d_emo.latents import SHIPPED, SHIPPED_VAE, CachedLatents, PixelCodec, VAECodec, load_codec, sample_moments


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
    with pytest.raises(InputError, match="there is no VAE"):
        load_codec("d-emo-f9")
    with pytest.raises(InputError, match="does not hold a readable AutoencoderKL"):
        load_codec(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not hold a readable AutoencoderKL"):
        load_codec(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf download nobody/no-such-vae.*--vae d-emo-f8"):
        load_codec("nobody/no-such-vae")


def test_cached_latents_are_the_moments_and_are_reused(vae, tmp_path, monkeypatch):
    images, codec, path = Digits(16, split="test"), VAECodec(vae, "v"), tmp_path / "latents.safetensors"
    cached = CachedLatents(images, codec, path=path, device=torch.device("cpu"))
    moments, label = cached[7]
    torch.testing.assert_close(moments.float(), codec.moments(images[7][0][None])[0], rtol=2e-3, atol=2e-3)
    assert label == images.label(7) and len(cached) == len(images)
    calls = []
    monkeypatch.setattr(codec, "moments", lambda batch: calls.append(1) or VAECodec(vae, "v").moments(batch))
    again = CachedLatents(images, codec, path=path, device=torch.device("cpu"))
    assert not calls and torch.equal(again.moments, cached.moments)
    CachedLatents(Digits(24, split="test"), codec, path=path, device=torch.device("cpu"))
    assert calls


def test_cached_latents_hold_both_mirrors_of_images_that_may_flip(vae, tmp_path):
    from PIL import Image

    (tmp_path / "a").mkdir()
    Image.linear_gradient("L").rotate(90).resize((16, 16)).save(tmp_path / "a" / "x.png")
    images, codec = ImageFolder(tmp_path, 16), VAECodec(vae, "v")
    moments, _ = CachedLatents(images, codec, path=tmp_path / "l.safetensors", device=torch.device("cpu"))[0]
    plain, mirrored = moments.float().chunk(2)
    image = images[0][0][None]
    torch.testing.assert_close(mirrored, codec.moments(image.flip(-1))[0], rtol=2e-3, atol=2e-3)
    assert not torch.allclose(plain, mirrored, atol=1e-2)


def test_the_shipped_vae_reconstructs_as_its_card_says():
    import json

    from d_emo.data import Shapes1000
    from d_emo.training.vae import reconstruction_psnr

    codec = load_codec(SHIPPED_VAE)
    claimed = json.loads((SHIPPED / SHIPPED_VAE / "psnr.json").read_text())
    assert codec.downsample == 8 and codec.channels == 4
    shapes = Subset(Shapes1000(64, num_images=1000, split="test"), range(0, 1000, 9))  # some of every shape and ground
    for name, data in (("shapes", shapes), ("digits", Digits(64, split="test"))):
        psnr = reconstruction_psnr(codec.vae, data, torch.device("cpu"))
        assert psnr > 25 and psnr == pytest.approx(claimed[name], abs=1.0)
