"""Training on encoded latents, and what they tell of how their images were read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from test_encode import SMALL, HalfCodec, pictures, shapes

from d_emo.config import TrainSettings
from d_emo.data import ImageFolder, Reading, open_dataset
from d_emo.errors import InputError
from d_emo.latents import LatentDataset, PixelCodec, encode, load_codec, shards
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask

__all__ = ["pictures"]  # a fixture


TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48}, "vae": "d-emo-f8", "batch_size": 4,
    "max_steps": 4, "state_every": 2, "snapshot_every": 4, "learning_rate": 1e-3,
}


def losses(folder, **changes):
    """Train, and return the loss of every step, bit by bit."""
    settings = TrainSettings(**{**TINY, "output_dir": str(folder), **changes})
    task, found = DenoiserTask(settings), []
    plain = task.loss
    task.loss = lambda *args: found.append(plain(*args)) or found[-1]
    fit(task, settings)
    return [step["loss"].item() for step in found]


def test_training_on_stored_latents_is_training_on_the_images(tmp_path, pictures):
    """The same losses to the last bit: float32, and a batch of images goes through the VAE in one piece either way."""
    online = losses(tmp_path / "a", data_dir=str(pictures), image_size=64)
    images, codec = ImageFolder(pictures, 64), load_codec("d-emo-f8")
    encode(images, codec, tmp_path / "float32", **{**SMALL, "shard_size": 8})
    assert losses(tmp_path / "b", latents=str(tmp_path / "float32")) == online
    encode(images, codec, tmp_path / "one-by-one", **{**SMALL, "batch_size": 1})
    assert losses(tmp_path / "c", latents=str(tmp_path / "one-by-one")) == pytest.approx(online, rel=1e-5)
    encode(images, codec, tmp_path / "float16", **{**SMALL, "dtype": "float16"})
    rounded = losses(tmp_path / "d", latents=str(tmp_path / "float16"))
    assert rounded == pytest.approx(online, rel=1e-3) and rounded != online
    assert losses(tmp_path / "e", data_dir=str(pictures), image_size=64, cache_latents=True) == rounded


def test_a_run_on_stored_latents_resumes_exactly(tmp_path):
    encode(shapes(30, 64), load_codec("d-emo-f8"), tmp_path / "latents", **{**SMALL, "shard_size": 7})
    where = {"latents": str(tmp_path / "latents"), "vae": None}
    whole = losses(tmp_path / "whole", **where)
    assert losses(tmp_path / "parts", **where, max_steps=2) + losses(tmp_path / "parts", **where) == whole


def test_training_takes_what_the_index_says(tmp_path):
    encode(shapes(30), HalfCodec(), tmp_path / "h", **SMALL)
    encode(shapes(30), PixelCodec(), tmp_path / "p", **SMALL)
    settings = TrainSettings(**{**TINY, "vae": None, "latents": str(tmp_path / "p")})
    task = DenoiserTask(settings)
    settings = task.settings
    assert (settings.vae, settings.image_size, settings.output_dir) == ("pixels", 8, "results/D-EMOv2-Ti-2-p")
    assert task.model.latent_shape == (3, 8, 8) and len(task.images.class_names) == 1000
    assert not any("No data named" in line for line in task.introduction())


def test_unconditional_training_takes_stored_latents_too(tmp_path):
    encode(shapes(30), PixelCodec(), tmp_path / "p", **SMALL)
    task = DenoiserTask(TrainSettings(**{**TINY, "vae": None, "latents": str(tmp_path / "p"), "unconditional": True}))
    moments, label = task.dataset[7]
    assert torch.equal(moments, LatentDataset(tmp_path / "p")[7][0]) and label == 0
    assert task.encoded and len(task.images.class_names) == 1


def test_latents_of_another_size_vae_or_scaling_are_refused_with_both_values(tmp_path):
    folder = tmp_path / "latents"
    encode(shapes(30), PixelCodec(), folder, **SMALL)

    def train(**changes):
        DenoiserTask(TrainSettings(**{**TINY, "vae": "pixels", "latents": str(folder), **changes}))

    train(image_size=8)
    with pytest.raises(InputError, match="of 8 px images, not `image_size` 256"):
        train(image_size=256)
    with pytest.raises(InputError, match=r"those of pixels \(encoder pixels\), not of `vae` d-emo-f8"):
        train(vae="d-emo-f8")
    with pytest.raises(InputError, match="give one only"):
        train(data_dir="images")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "scaling": 0.18215}))
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        train()
    del index["sha256"]  # as older versions wrote it
    (folder / "index.json").write_text(json.dumps({**index, "scaling": 0.18215}))
    with pytest.raises(InputError, match=r"scaling 0\.18215, but pixels now has scaling 1\.0"):
        train()


def test_stored_latents_are_mapped_not_read(tmp_path):
    encode(shapes(30), PixelCodec(), tmp_path, **SMALL)
    stored = LatentDataset(tmp_path)
    stored[0], stored[29]
    assert sorted(stored._shards) == [0, 2]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc to look into")
    assert str(shards.shard_path(tmp_path, 2)) in maps.read_text()
    assert str(shards.shard_path(tmp_path, 1)) not in maps.read_text()


# ---- how the images were read ----------------------------------------------------------------------------------------


def edit_index(folder, **changes):
    """Change what the index says; None takes a key away, as in folders of before."""
    index = {**json.loads((folder / "index.json").read_text()), **changes}
    (folder / "index.json").write_text(json.dumps({key: index[key] for key in index if index[key] is not None}))


def test_latents_without_mirror_images_hold_one_set_of_moments_and_train_unmirrored(tmp_path, pictures):
    def stored(folder, **options):
        return LatentDataset(tmp_path / folder, **options)

    for folder, flip in (("both", None), ("plain", False)):
        images = open_dataset(dataset="", data_dir=str(pictures), image_size=8, flip=flip)
        encode(images, HalfCodec(), tmp_path / folder, **SMALL)
    assert stored("plain")[0][0].shape == (6, 8, 8) and stored("both")[0][0].shape == (12, 8, 8)
    assert torch.equal(stored("both", flip=False)[3][0], stored("plain")[3][0]) and not stored("plain").flip
    with pytest.raises(InputError, match=r"plain hold no mirror images \(`flip`\)"):
        stored("plain", flip=True)
    encode(ImageFolder(pictures, 8), PixelCodec(), tmp_path / "train", **SMALL)
    task = DenoiserTask(TrainSettings(**{**TINY, "vae": None, "latents": str(tmp_path / "train"), "flip": False}))
    moments, step = torch.stack([task.dataset[0][0]] * 2), task.draw(torch.Generator().manual_seed(0), 2)
    assert task.facts["flip"] is False and moments.shape == (2, 6, 8, 8)
    for flip in (True, False):
        latents = task._latents(moments, step._replace(flip=torch.full((2,), flip)))
        assert torch.equal(latents[0], ImageFolder(pictures, 8)[0][0])


def test_latents_tell_how_their_images_were_read(tmp_path, pictures):
    images = ImageFolder(pictures, 8, reading=Reading(exif=False, background="red"))
    encode(images, PixelCodec(), tmp_path / "l", **SMALL)
    index = json.loads((tmp_path / "l" / "index.json").read_text())
    assert (index["exif"], index["background"], index["mirrored"]) == (False, "red", True)

    def train(**changes):
        return DenoiserTask(TrainSettings(**{**TINY, "vae": None, "latents": str(tmp_path / "l"), **changes}))

    assert train().settings.exif is False and train(background="red").settings.background == "red"
    with pytest.raises(InputError, match="read with `exif` False, not True"):
        train(exif=True)
    with pytest.raises(InputError, match="read with `background` red, not white"):
        train(background="white")
    with pytest.raises(InputError, match="exif False, not True; background red, not white"):
        encode(ImageFolder(pictures, 8), PixelCodec(), tmp_path / "l", **SMALL)
    edit_index(tmp_path / "l", exif=None, background=None, sha256=None)  # of before these keys
    assert train().facts["exif"] is False and train().facts["background"] is None


def test_what_an_older_version_encoded_is_kept_when_finished_and_else_not_mixed(tmp_path, pictures):
    made = asdict(shards.Origin.of(ImageFolder(pictures, 8), PixelCodec(), dtype="float32", shard_size=10))
    older = {key: value for key, value in made.items() if key not in ("exif", "background")}
    origin = shards.Origin(**made)
    with pytest.raises(InputError, match="exif False, not True; background None, not white"):
        origin.check_same(older, tmp_path)
    (tmp_path / "index.json").touch()
    origin.check_same(older, tmp_path)
    drawn = shards.Origin.of(shapes(), PixelCodec(), dtype="float32", shard_size=10)
    drawn.check_same({key: value for key, value in asdict(drawn).items() if key in older}, tmp_path / "unfinished")
