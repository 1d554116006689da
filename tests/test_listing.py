"""The walk that all readers of folders share, the order of classes, and folders of splits."""

import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from d_emo.config import ClassifierSettings, TrainSettings
from d_emo.data import ImageFolder, list_files, open_dataset
from d_emo.data.listing import in_class_order
from d_emo.errors import InputError
from d_emo.evaluation import open_images
from d_emo.files import cache_folder, expand_home
from d_emo.training.classifier import ClassifierTask
from d_emo.training.denoiser import DenoiserTask


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    return path


def classes(root, *names, count=2):
    for number, name in enumerate(names):
        for index in range(count):
            picture(root / name / f"{index}.png", 10 * number + index)
    return root


def files_of_all_readers(root):
    """How many images training with and without classes, encoding and FID find."""
    one = open_dataset(dataset="", data_dir=str(root), image_size=8, one_class=True)
    return len(ImageFolder(root, 8)), len(one), open_images(root).num_images


def test_hidden_files_and_what_systems_leave_are_no_images_and_no_classes(tmp_path):
    root = classes(tmp_path / "set", "cat", "dog")
    for name in (
        ".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0.png", "cat/deep/.hidden/0.png", "cat/.0.png",
        "__MACOSX/cat/0.png", "dog/__MACOSX/0.png", "@eaDir/0.png", "dog/@eaDir/0.png", "lost+found/0.png",
    ):
        picture(root / name)
    (root / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    assert files_of_all_readers(root) == (4, 4, 4) and ImageFolder(root, 8).class_names == ["cat", "dog"]
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    assert open_images(tmp_path / "set.zip").num_images == 4


def test_every_reader_follows_links_and_loops_end(tmp_path):
    real, root = classes(tmp_path / "real", "cat", "dog"), tmp_path / "set"
    (root / "cow").mkdir(parents=True)
    for link, target in (
        ("cat", real / "cat"), ("dog", real / "dog"), ("cow/more", real / "cat"), ("cow/up", root), ("loop", root),
        ("cow/beside", root / "cow"),
    ):
        (root / link).symlink_to(target, target_is_directory=True)
    picture(root / "cow" / "0.png")
    data = ImageFolder(root, 8)
    assert data.class_names == ["cat", "cow", "dog"] and list(data.labels) == [0, 0, 1, 1, 1, 2, 2]
    assert data.files[2:5] == [root / "cow" / name for name in ("0.png", "more/0.png", "more/1.png")]
    assert len(list_files(root)) == open_images(root).num_images == 5  # of those, each folder once
    (root / "cow" / "gone.png").symlink_to(tmp_path / "gone.png")  # named as unreadable, not left out
    (root / "cow" / "self.png").symlink_to(root / "cow" / "self.png")
    assert len(ImageFolder(root, 8)) == 9


def test_the_order_of_files_is_that_of_their_paths(tmp_path):
    root, names = tmp_path / "set", ["a b/1.png", "a/b/2.png", "a/b.png", "a/a.jpg", "B/10.png", "B/9.PNG", "B/x.txt"]
    for name in names:
        picture(root / name) if not name.endswith("txt") else (root / name).write_text("")
    found = [path for folder in sorted(root.iterdir()) for path in sorted(folder.rglob("*")) if path.suffix]
    found.remove(root / "B" / "x.txt")
    assert ImageFolder(root, 8).files == found and len(found) == 6
    (root / "a" / "folder.png").mkdir()  # a folder is no image, whatever its name
    assert ImageFolder(root, 8).files == found


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    classes(tmp_path / "set", "cat", "dog")
    scan = os.scandir

    def scandir(folder):
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(InputError, match=r"set/dog cannot be read \(Permission denied\)"):
        ImageFolder(tmp_path / "set", 8)


def test_classes_whose_names_are_numbers_are_in_the_order_of_numbers(tmp_path):
    root = classes(tmp_path, *(str(number) for number in range(12)), count=1)
    assert ImageFolder(root, 8).class_names == [str(number) for number in range(12)]
    assert in_class_order(["10", "9", "009"]) == ["009", "9", "10"]
    assert in_class_order(["10", "9", "a"]) == ["10", "9", "a"]  # as text, where not all are numbers
    assert in_class_order(["²", "1"]) == ["1", "²"]


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("train", "val"), "`data_dir` {root}/train with `validate_dir` {root}/val"),
        (("train", "test", "val", "meta"), "`data_dir` {root}/train with `validate_dir` {root}/val"),
        (("Training", "validation"), "`data_dir` {root}/Training with `validate_dir` {root}/validation"),
        (("train2017", "val2017"), "`data_dir` {root}/train2017 with"),
        (("test_set", "training_set"), "{root}/training_set with"),
        (("train",), "`data_dir` {root}/train. "), (("test",), "`data_dir` {root}/test. "),
    ],
)  # fmt: skip
def test_a_folder_of_splits_is_refused_and_says_what_was_meant(tmp_path, names, meant):
    for name in names:
        classes(tmp_path / name, "cat", "dog", count=1)
    for one_class in (False, True):
        with pytest.raises(InputError) as error:
            open_dataset(dataset="", data_dir=str(tmp_path), image_size=8, one_class=one_class)
        assert meant.format(root=tmp_path) in str(error.value) and f"folder:{tmp_path}" in str(error.value)
    data = open_dataset(dataset="", data_dir=f"folder:{tmp_path}", image_size=8)
    assert data.class_names == sorted(names) and len(data) == 2 * len(names)


def test_classes_that_only_look_like_splits_are_classes(tmp_path):
    assert ImageFolder(classes(tmp_path / "a", "bus", "train"), 8).class_names == ["bus", "train"]
    names = ["test_tube", "train_station", "training ground"]
    assert ImageFolder(classes(tmp_path / "b", *names), 8).class_names == names


def test_imagenets_layout_is_understood_by_both_trainers(tmp_path):
    root = tmp_path / "imagenet"
    for part in ("train", "val"):
        classes(root / part, "n01440764", "n01443537")
    apart = {"data_dir": str(root / "train"), "validate_dir": str(root / "val"), "output_dir": str(tmp_path / "run")}
    tiny = {"image_size": 32, "batch_size": 2, "validate_every": 1, "max_steps": 1}
    denoiser = {"model": "D-EMOv2-Ti-4", "vae": "pixels", "model_options": {"depth": 1, "hidden_size": 48}}
    task = DenoiserTask(TrainSettings(**apart, **tiny, **denoiser))
    assert task.images.class_names == ["n01440764", "n01443537"] and len(task.held_out) == 4
    with pytest.raises(InputError, match="imagenet/train with `validate_dir` .*imagenet/val"):
        DenoiserTask(TrainSettings(**{**apart, "data_dir": str(root), "validate_dir": None}, **tiny, **denoiser))
    options = {"model": "emov2_1m", "image_size": 64}
    for names in ("train", "val"), ("training", "validation"):
        for old, new in zip(("train", "val"), names, strict=True):
            (root / old).rename(root / new)
        task = ClassifierTask(ClassifierSettings(data_dir=str(root), batch_size=2, output_dir="x", **options))
        assert [each.files[0].parent.parent.name for each in (task.dataset, task.held_out)] == list(names)
        for old, new in zip(("train", "val"), names, strict=True):
            (root / new).rename(root / old)
    (root / "val").rename(root / "test")  # to be measured on once, not while choosing
    with pytest.raises(InputError, match="imagenet/train with `validate_dir` .*imagenet/test"):
        ClassifierTask(ClassifierSettings(data_dir=str(root), batch_size=2, output_dir="x", **options))


def test_a_home_that_cannot_be_found_is_said_or_done_without(monkeypatch):
    with pytest.raises(InputError, match="home folder in ~nobody-of-this-name/x cannot be found"):
        expand_home("~nobody-of-this-name/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", home)
    assert cache_folder().name.startswith("d-emo-")
