"""Drawing through a codec that takes the place of the snapshot's: another decoder of the same latents."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from d_emo.app.studio import Studio
from d_emo.cli import run_verb
from d_emo.config import AppSettings, FidSettings, JudgeSettings, SampleSettings
from d_emo.errors import InputError
from d_emo.evaluation import Measurement, measure_snapshot
from d_emo.io.snapshot import SHIPPED_SNAPSHOT, load_denoiser
from d_emo.latents import load_codec
from d_emo.latents.codec import DECODER
from d_emo.sampling import Sampler
from d_emo.sampling.pipeline import DEMOPipeline

CODEC, OTHER = "d-emo-f8", {"encoder": "encoder.conv_in.bias", "decoder": "decoder.conv_out.bias"}


@pytest.fixture
def changed(tmp_path):
    """A function that writes the codec of the shipped snapshot with a part of it changed."""

    def write(part: str) -> str:
        vae = load_codec(CODEC).vae
        if part == "scaling":
            vae.register_to_config(scaling_factor=0.5)
        else:
            with torch.no_grad():
                vae.get_parameter(OTHER[part]).add_(0.25)
        vae.save_pretrained(tmp_path / part)
        return str(tmp_path / part)

    return write


def image(**options) -> torch.Tensor:
    """Shape: -> (1, 3, 64, 64) uint8."""
    sampler = Sampler.open(options.pop("snapshot", SHIPPED_SNAPSHOT), steps=1, guidance=1.0, device="cpu", **options)
    return next(sampler.images([207], [0]))


def test_a_decoder_that_was_trained_on_draws_the_latents_of_a_snapshot(changed):
    other, plain = changed("decoder"), image()
    drawn, own = image(vae=other), load_denoiser(SHIPPED_SNAPSHOT)
    assert torch.equal(image(vae=CODEC), plain) and not torch.equal(drawn, plain)
    own.codec = other
    assert torch.equal(image(snapshot=own), drawn)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older"])
@pytest.mark.parametrize("part, words", [("encoder", "encoder .* here, .* there"), ("scaling", "scaling 0.5 here")])
def test_a_codec_of_other_latents_is_refused(changed, part, words, recorded):
    snapshot, own = load_denoiser(SHIPPED_SNAPSHOT), load_codec(CODEC)
    if recorded:
        snapshot.meta |= {"encoder": own.fingerprint, "scaling": own.scaling, "shift": own.shift}
        snapshot.codec = "/where/the/codec/was"
        image(snapshot=snapshot, vae=changed("decoder"))  # which need not be there
    with pytest.raises(InputError, match=f"`vae` .*{part} has other latents than {snapshot.codec}, .*{words}"):
        image(snapshot=snapshot, vae=changed(part))
    with pytest.raises(InputError, match="the codec pixels has latents of 3 channels"):
        image(snapshot=snapshot, vae="pixels")


def test_every_verb_that_draws_takes_it_and_writes_it_down(changed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = changed("decoder")
    run_verb("sample", ["--class", "207", "--num-images", "1", "--steps", "1", "--vae", other, "--output", "a.png"])
    assert f"codec     {other}\n" in capsys.readouterr().out
    assert json.loads(Image.open("a.png").text["d-emo"])["vae"] == other
    studio = Studio(load_denoiser(SHIPPED_SNAPSHOT), AppSettings(vae=other))
    assert studio.sampler.codec.name == other
    assert f" --vae {other} " in studio.command(studio.read([207], 1, 0, 1, None, 1))
    for kind, given in ((SampleSettings, {}), (FidSettings, {"checkpoint": "x", "reference": "y"}),
                        (JudgeSettings, {"checkpoint": "x", "classifier": "y"})):  # fmt: skip
        assert kind(vae=other, **given).vae == other
    with pytest.raises(InputError, match="`vae` is for images drawn from a `checkpoint` only"):
        FidSettings(samples="x", reference="y", vae=other)


def test_fid_measures_through_it_and_keeps_its_features_apart(changed, tmp_path):
    asked = []

    class Asked(Measurement):
        def of_generated(self, generate, num_images, **told):
            asked.append(told)

    for vae in (None, changed("decoder")):
        settings = FidSettings(checkpoint=str(SHIPPED_SNAPSHOT), vae=vae, steps=1, metrics=["isc"]).resolve()
        measure_snapshot(object.__new__(Asked), load_denoiser(SHIPPED_SNAPSHOT), settings, device="cpu")
    own, other = asked
    assert "vae" not in own["sampling"] and other["sampling"]["vae"] == str(tmp_path / "decoder")
    assert own["identity"]["codec"][0] == CODEC and own["identity"] != other["identity"]


def test_a_pipeline_takes_it_by_name_or_as_diffusers_do(changed, tmp_path):
    other = changed("decoder")
    theirs = AutoencoderKL.from_pretrained(other)
    by_name = DEMOPipeline.from_snapshot(SHIPPED_SNAPSHOT, vae=other)
    by_object = DEMOPipeline.from_pretrained(SHIPPED_SNAPSHOT, vae=theirs)
    by_name.save_pretrained(tmp_path / "saved")
    for pipe in (by_name, by_object, DEMOPipeline.from_pretrained(tmp_path / "saved")):
        weights = pipe.vae.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in theirs.state_dict().items())
    assert [name for name, value in load_codec(CODEC).vae.state_dict().items()
            if not torch.equal(value.float(), weights[name].float())] == [OTHER["decoder"]]  # fmt: skip
    assert OTHER["decoder"].startswith(DECODER) and Path(other).is_dir()
