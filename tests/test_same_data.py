"""A run goes on with the data that it was begun with, wherever they are now, and with no others of the same name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from d_emo.config import (
    ClassifierSettings,
    DetectorSettings,
    SegmenterSettings,
    TrainSettings,
    VAESettings,
    VideoSettings,
)
from d_emo.data import AS_VIEWED, Digits, OneClass, open_dataset
from d_emo.data.scenes import DigitScenes
from d_emo.detection.augment import TrainingImages, augmentation
from d_emo.detection.coco import CocoImages
from d_emo.errors import InputError, OtherRunError, RunError
from d_emo.latents import LatentDataset, PixelCodec, encode
from d_emo.segmentation.augment import TrainingCrops
from d_emo.segmentation.fundus import FundusFolder
from d_emo.segmentation.images import LabelledScenes, MaskFolder
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.same_data import check_same_data, trace_of

TINY = {
    "model": "D-EMOv2-Ti-2", "model_options": {"depth": 1, "hidden_size": 48}, "image_size": 8, "vae": "pixels",
    "batch_size": 4, "max_steps": 1, "state_every": 1, "tracker": "none",
}  # fmt: skip


def make(folder: Path, *, classes: tuple[str, ...] = ("cat", "dog"), images: int = 3, seed: int = 0) -> Path:
    """Pictures whose files are called alike everywhere."""
    draws = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(images):
            Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
    return folder


def train(data_dir: Path, **options) -> Path:
    """Into the run folder that follows from the name of the data."""
    AcceleratorState._reset_state(True)
    settings = TrainSettings(**{**TINY, "data_dir": str(data_dir), **options})
    return fit(DenoiserTask(settings), settings)


def test_a_run_goes_on_with_its_data_elsewhere_but_with_no_others_of_their_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first = make(tmp_path / "a" / "pets")
    assert train(first) == Path("results/D-EMOv2-Ti-2-pets-8/snapshots/step-1")
    for place, changes, reason in (
        ("b", {"seed": 1}, "the images are others"),
        ("c", {"images": 4}, "there were 6 images, now there are 8"),
        ("d", {"classes": ("cat", "fox")}, "the classes are others, such as dog"),
    ):
        other = make(tmp_path / place / "pets", **changes)
        with pytest.raises(OtherRunError, match=f"results/D-EMOv2-Ti-2-pets-8 was begun with other data .data_dir was "
                           f"{first}, now {other}.: {reason}; give .* or choose another `output_dir`"):  # fmt: skip
            train(other)
    moved = tmp_path / "e" / "pets"
    shutil.move(first, moved)
    capsys.readouterr()
    train(moved, max_steps=2)
    assert f"the data are at another place (data_dir was {first}, now {moved})" in capsys.readouterr().out
    make(moved / "more", classes=("cat",), images=1).joinpath("cat/0.png").rename(moved / "cat" / "new.png")
    shutil.rmtree(moved / "more")
    train(moved, max_steps=3)  # where the data are, images may come and go
    assert "another place" not in capsys.readouterr().out


def test_latents_of_other_images_are_other_data(tmp_path):
    folders = [tmp_path / place / "latents" for place in "ab"]
    for seed, folder in enumerate(folders):
        data = open_dataset(dataset="", data_dir=str(make(tmp_path / f"images-{seed}", seed=seed)), image_size=8)
        encode(data, PixelCodec(), folder, device=torch.device("cpu"))
    traces = [trace_of(LatentDataset(folder)) for folder in folders]
    assert traces[0]["images"] == traces[1]["images"] == 6 and traces[0]["digest"] != traces[1]["digest"]
    assert trace_of(OneClass(LatentDataset(folders[0]))) == traces[0]
    settings = TrainSettings(latents=str(folders[1]))
    begun = {"latents": str(folders[0])}
    with pytest.raises(InputError, match="latents was .*, now .*: the images are others"):
        check_same_data(settings, begun, {"data": traces[0]}, traces[1], ["cat", "dog"])


def objects(folder: Path, seed: int) -> TrainingImages:
    """In COCO's format."""
    make(folder, classes=("images",), seed=seed)
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(3)],
        "categories": [{"id": 1, "name": "cat"}], "annotations": [],
    }
    (folder / "objects.json").write_text(json.dumps(content))
    images = CocoImages(folder / "objects.json", folder / "images", reading=AS_VIEWED)
    return TrainingImages(images, augmentation("none", flip=False, side=None), first_label=0, seed=0)


def masks(folder: Path, seed: int) -> TrainingCrops:
    """In the simple layout."""
    make(folder, classes=("images", "masks"), seed=seed)
    for number in range(3):
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "masks" / f"{number}.png")
    (folder / "classes.txt").write_text("ground\nvessel\n")
    return TrainingCrops(MaskFolder(folder), 8)


def fundus(folder: Path, seed: int) -> TrainingCrops:
    """As HRF has it."""
    make(folder, classes=("images", "manual1"), seed=seed)
    return TrainingCrops(FundusFolder(folder), 8)


@pytest.mark.parametrize("opened", [objects, masks, fundus])
def test_pictures_with_objects_and_masks_are_told_apart_by_their_files(tmp_path, opened):
    traces = [trace_of(opened(tmp_path / str(place), seed)) for place, seed in enumerate((0, 0, 1))]
    assert traces[0] == traces[1] and traces[0]["digest"] != traces[2]["digest"]
    assert all(trace["images"] == 3 for trace in traces)


@pytest.mark.parametrize("wrapped", [lambda data: data, OneClass])
def test_a_stream_is_not_read_for_its_trace(tmp_path, wrapped):
    def source(index: int):
        raise RunError("the stream broke off")

    data = open_dataset(dataset="", data_dir=str(make(tmp_path / "images")), image_size=8)
    data.sequential, data.source = True, source
    assert trace_of(wrapped(data)) == {"images": 6, "digest": trace_of(Digits(8))["digest"]}


def test_built_in_pictures_have_no_files():
    made = [DigitScenes(32, num_images=2), LabelledScenes(32, num_images=2), Digits(8, split="test")]
    assert len({trace_of(each)["digest"] for each in made}) == 1


@pytest.mark.parametrize("kind, name", [
    (TrainSettings, "data_dir"), (ClassifierSettings, "data_dir"), (ClassifierSettings, "latents"),
    (VAESettings, "data_dir"), (SegmenterSettings, "data_dir"), (VideoSettings, "data_dir"),
    (DetectorSettings, "annotations"), (DetectorSettings, "images"),
])  # fmt: skip
def test_every_kind_of_training_knows_where_its_data_are(kind, name, tmp_path):
    settings, trace = kind(output_dir="run", **{name: str(tmp_path / "there")}), {"images": 6, "digest": "x"}
    state = {"data": trace, "class_names": ["cat", "dog"]}

    def check(place: object, known: dict = state, **changes) -> str:
        return check_same_data(settings, {name: str(place)}, known, {**trace, **changes}, ["dog", "cat"])

    assert check(tmp_path / "there", images=7) == check(tmp_path / "." / "there") == ""
    assert check(tmp_path / "here").startswith(f"the data are at another place ({name} was {tmp_path / 'here'}, now ")
    assert check(tmp_path / "here", {}, images=7)  # older states say nothing of the data
    for changes in ({"images": 7}, {"digest": "y"}):
        with pytest.raises(OtherRunError, match=f"begun with other data .{name} was .*here, now .*there"):
            check(tmp_path / "here", **changes)
    with pytest.raises(OtherRunError, match=f"{name} was .*here, now built-in"):
        check_same_data(kind(output_dir="run"), {name: str(tmp_path / "here")}, state, {**trace, "images": 7}, ["cat"])


def test_one_class_may_be_called_as_its_folder_and_damaged_files_are_left_to_training(tmp_path):
    settings, trace = TrainSettings(data_dir="there/photos"), {"images": 6, "digest": "x"}
    known = {"data": trace, "class_names": ["pictures"]}
    assert check_same_data(settings, {"data_dir": "here/pictures"}, known, trace, ["photos"])
    data = open_dataset(dataset="", data_dir=str(make(tmp_path)), image_size=8)
    before = trace_of(data)
    (tmp_path / "cat" / "0.png").unlink()
    assert trace_of(data) != before and trace_of(Digits(8)) == trace_of(Digits(8))
