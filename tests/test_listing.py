"""The walk that all readers of folders share, the order of classes, and folders of splits."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.config import ClassifierSettings, DoctorSettings, EncodeSettings, TrainSettings, parse_settings
from d_emo.data import ImageFolder, in_order_of, list_files, open_dataset
from d_emo.data.names import check_class_names, in_class_order
from d_emo.errors import InputError
from d_emo.evaluation import open_images
from d_emo.evaluation.classifier_metrics import open_real
from d_emo.files import cache_folder, expand_home
from d_emo.io.snapshot import load_denoiser
from d_emo.io.training_state import save_state
from d_emo.training import fit
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
    data = ImageFolder(root, 8)
    assert data.class_names == [str(number) for number in range(12)]
    assert all(path.parent.name == data.class_names[label] for path, label in zip(data.files, data.labels, strict=True))
    assert data.files == sorted(data.files)  # image i is the one that it was
    assert in_class_order(["10", "9", "009"]) == ["009", "9", "10"]
    assert in_class_order(["10", "9", "a"]) == ["10", "9", "a"]  # as text, where not all are numbers
    assert in_class_order(["²", "1"]) == ["1", "²"]


def test_runs_and_snapshots_keep_the_order_of_classes_that_they_had(tmp_path, monkeypatch):
    root = classes(tmp_path / "set", "2", "9", "10")
    tiny = {
        "model": "D-EMOv2-Ti-4", "vae": "pixels", "model_options": {"depth": 1, "hidden_size": 48}, "image_size": 8,
        "batch_size": 2, "data_dir": str(root), "learning_rate": 1e-2, "tracker": "none",
    }

    def train(folder, steps, **changes):
        settings = TrainSettings(**{**tiny, **changes}, max_steps=steps, output_dir=str(tmp_path / folder))
        task = DenoiserTask(settings)
        return load_denoiser(fit(task, settings)), task

    with monkeypatch.context() as patch:  # as 0.1.0 did it
        patch.setattr("d_emo.data.folder.in_class_order", sorted)
        patch.setattr("d_emo.training.loop.save_state", lambda states, step, state, **own: save_state(
            states, step, {key: value for key, value in state.items() if key != "class_names"}, **own
        ))
        whole = train("whole", 4)[0]
        for folder in "old", "cached":
            train(folder, 2, cache_latents=folder == "cached")
    assert whole.class_names == ["10", "2", "9"]
    for folder in "old", "cached":
        for steps in 3, 4:
            snapshot, task = train(folder, steps, cache_latents=folder == "cached", validate_every=1,
                                   validate_dir=str(root))
            assert snapshot.class_names == task.held_out.class_names == whole.class_names
            assert [task.held_out.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
            assert task.held_out[4][1] == 2 and task.held_out.origin(4) == str(root / "9" / "0.png")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(load_denoiser(tmp_path / "old").model.state_dict()[name], value), name
    assert train("new", 1)[0].class_names == ["2", "9", "10"]
    real, _ = open_real("folder", 8, whole.class_names, data_dir=str(root))
    assert [real.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert in_order_of(real, ["10", "2", "3"]) is None and in_order_of(real, ["10", "2", "9"]) is real


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("train", "val"), "`data_dir` {root}/train with `validate_dir` {root}/val"),
        (("train", "test", "val", "meta"), "`data_dir` {root}/train with `validate_dir` {root}/val"),
        (("Training", "validation"), "`data_dir` {root}/Training with `validate_dir` {root}/validation"),
        (("train2017", "val2017"), "`data_dir` {root}/train2017 with"),
        (("test_set", "training_set"), "{root}/training_set with"),
        (("seg_pred", "seg_test", "seg_train"), "{root}/seg_train with `validate_dir` {root}/seg_test"),
        (("train_blurred", "val_blurred"), "{root}/train_blurred with"), (("trainA", "testA"), "{root}/trainA with"),
        (("train.X1", "train.X2", "val.X"), "links to all of train.X1, train.X2) with `validate_dir` {root}/val.X"),
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
    names = ["bullet_train", "test_tube", "train_station", "training ground"]
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
    (root / "train").rename(root / "train1")
    classes(root / "train2", "n01440764", "n01443537")  # of several, none is taken for all
    with pytest.raises(InputError, match="links to all of train1, train2"):
        ClassifierTask(ClassifierSettings(data_dir=str(root), batch_size=2, output_dir="x", **options))
    shutil.rmtree(root / "train2")
    (root / "train1").rename(root / "train")
    (root / "val").rename(root / "test")  # to be measured on once, not while choosing
    with pytest.raises(InputError, match="imagenet/train with `validate_dir` .*imagenet/test"):
        ClassifierTask(ClassifierSettings(data_dir=str(root), batch_size=2, output_dir="x", **options))


@pytest.mark.parametrize(
    ("name", "reason"),
    [(b"caf\xe9", "'caf.udce9', which is not UTF-8"), (b"a\nb", "control characters"), (b"a\\\\b", "path separator"),
     (b" ", "is empty")],
)  # fmt: skip
def test_names_that_cannot_be_written_are_refused_before_anything_is_trained(tmp_path, name, reason):
    for each in (name, b"dog"):
        picture(tmp_path / os.fsdecode(each) / "0.png")
    with pytest.raises(InputError, match=f"is called .*{reason}"):
        open_dataset(dataset="", data_dir=str(tmp_path), image_size=8)
    with pytest.raises(InputError, match=f"is called .*{reason}"):
        open_dataset(dataset="", data_dir=str(tmp_path / os.fsdecode(name)), image_size=8, one_class=True)
    check_class_names(["été", "猫", "👩‍🚀", "C++", "."])


def test_a_home_that_cannot_be_found_is_said_or_done_without(monkeypatch):
    with pytest.raises(InputError, match="home folder in ~nobody-of-this-name/x cannot be found"):
        expand_home("~nobody-of-this-name/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", home)
    assert cache_folder().name.startswith("d-emo-")


def test_held_out_images_that_nobody_would_look_at_are_refused():
    for settings in (TrainSettings, ClassifierSettings, DoctorSettings):
        with pytest.raises(InputError, match="`validate_dir` x belongs to a `data_dir`; built-in data hold out"):
            settings(validate_dir="x")
    assert TrainSettings(latents="x", validate_dir="x", validate_every=1).validate_dir == "x"
    with pytest.raises(InputError, match="there is no setting 'validate-dir'"):
        parse_settings(EncodeSettings, "", ["--data-dir", "x", "--validate-dir", "x", "--output", "y"])
