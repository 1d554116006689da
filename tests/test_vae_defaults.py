"""What the settings of a codec are where they are left open, and what a run says of itself."""

import json

import pytest
import torch
from test_vae_training import DC, KL, TINY, train

from d_emo.config import VAESettings
from d_emo.latents import sample_moments
from d_emo.latents.codec import codec_of
from d_emo.training import vae as module
from d_emo.training.vae import AT_ONCE, SAMPLE, VAETask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A snapshot of train-vae."""
    return train(tmp_path_factory.mktemp("start") / "run", **KL)


def test_weights_are_settled_for_the_losses_that_there_are():
    plain, deep = VAESettings().resolve(), VAESettings(model="AutoencoderDC").resolve()
    assert (plain.kl_weight, deep.kl_weight) == (1e-4, None) and plain.perceptual_weight is None
    assert VAESettings(perceptual_features="emov2:x").resolve().perceptual_weight == 0.1
    assert VAESettings(init_from="x").resolve(model="AutoencoderDC").kl_weight is None
    assert VAESettings(perceptual_features="emov2:x", perceptual_weight=0.0).resolve().perceptual_weight == 0


def test_classes_of_the_shapes_are_read_by_their_parts_as_no_digits_are_mixed_in():
    assert VAESettings().resolve().digits_share == 0.25
    assert VAESettings(init_from="x").resolve().digits_share == 0, "whose data may have had none"
    task = VAETask(VAESettings(**KL, class_weight=0.1))
    assert task.settings.digits_share == 0 and (task.places, task.base) == ([100, 10, 1], 10)


def test_a_codec_that_goes_on_is_trained_by_a_lower_rate():
    rates = [VAESettings(init_from=name).resolve().learning_rate for name in (None, "x")]
    assert rates == [1e-3, 1e-4] and VAESettings(init_from="x", learning_rate=0.5).resolve().learning_rate == 0.5


def test_the_batch_norm_of_deep_compression_sees_all_images_of_a_process():
    deep = {"model": "AutoencoderDC", "batch_size": 48}
    assert VAESettings(**deep).resolve().micro_batch_size == 48
    assert VAESettings(**deep, micro_batch_size=16).resolve().micro_batch_size == 16
    assert VAESettings(batch_size=48).resolve().micro_batch_size is None
    for train_, size in (("all", 16), ("decoder", None)):
        settings = VAESettings(init_from="x", train=train_)
        assert settings.resolve().resolve(model="AutoencoderDC").micro_batch_size == size


@pytest.mark.parametrize(("options", "most"), [({"micro_batch_size": 2}, 2), ({"micro_batch_size": None}, 4),
                                               ({"micro_batch_size": 64, "batch_size": 64}, AT_ONCE)])  # fmt: skip
def test_no_more_images_are_measured_at_once_than_are_trained(options, most, monkeypatch):
    task, seen = VAETask(VAESettings(**{**KL, **options})), []
    given = torch.zeros(1, 2)
    monkeypatch.setattr(module, "reconstructed", lambda codec, batch: seen.append(len(batch)) or batch)
    task._errors(None, task.dataset, range(40))
    task.model.finished = lambda batches: seen.extend(map(len, batches)) or given
    assert task.finished(task.model) is given and max(seen) == most and sum(seen) == 40 + 64


def test_a_run_says_how_many_parameters_it_trains(start):
    whole, part = (VAETask(VAESettings(**{**TINY, "init_from": str(start), "train": train_}))
                   for train_ in ("all", "decoder"))  # fmt: skip
    trained = sum(each.numel() for each in part.model.parameters() if each.requires_grad)
    assert f"{trained / 1e6:.2f} M trained parameters" in part.introduction()[0]
    assert f"{whole.parameters / 1e6:.2f} M trained parameters" in whole.introduction()[0]
    assert trained < whole.parameters == part.parameters


def test_a_folder_goes_by_its_own_name(tmp_path, photos):
    options = {**KL, "data_dir": str(photos / "train"), "validate_dir": str(photos / "val"), "validate_every": 2}
    task = VAETask(VAESettings(**options))
    assert "images of train; run folder" in task.introduction()[0] and list(task.measured_on) == ["train"]
    assert task.figures({"train": 4.0, "train count": 1}).keys() == {"psnr_train"}
    snapshot = train(tmp_path / "run", **options)
    assert json.loads((snapshot / "psnr.json").read_text()).keys() == {"train"}
    assert "The picture shows images of the data themselves" in (snapshot / "README.md").read_text()


def test_latents_that_stay_are_computed_in_float32_whatever_the_run_computes_in(start):
    task = VAETask(VAESettings(**{**TINY, "init_from": str(start), "train": "decoder"}))
    images, noise = torch.rand(2, 3, 16, 16), torch.randn(2, *task.latent_shape)
    wanted = sample_moments(codec_of(task.model.vae).moments(images), noise)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(task.model.latents(images, noise)[0], wanted)


def test_a_card_says_what_was_scaled_by_what_and_what_it_started_from(start, tmp_path):
    def card(folder):
        return " ".join((folder / "README.md").read_text().split())

    for options, words in ((KL, "the scaling factor was"), (DC, "mean and variance of the latents, folded into the")):
        text = card(train(tmp_path / words[:4], **{**options, "num_images": 1025}))
        assert f"of parameters; {words}" in text and f"measured on {SAMPLE:,} training images |" in text
        assert "no VAE for other photographs" in text and "BatchNorm" not in text and "The picture" not in text
    whole, part = (card(train(tmp_path / train_, **TINY, init_from=str(start), train=train_))
                   for train_ in ("all", "decoder"))  # fmt: skip
    assert "the scaling factor was measured on the training images |" in whole
    assert "of the decoder's parameters; scaling and shift of the latents are those of the start |" in part
    assert "M parameters, whose decoder was trained with D-EMO, that" in part and "whose decoder" not in whole
    for text in (whole, part):
        assert f"It started from `{start}` and was trained on for images like" in text
        assert f"trained on, and those of `{start}`, from whose weights they started." in text
        assert "no VAE for other" not in text and "trained parameters" not in text
