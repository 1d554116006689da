"""``scripts/fid.py``: what it prints and writes, and one clear sentence for everything it cannot use."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.cli import reference, run_verb
from d_emo.data import centre_crop
from d_emo.errors import InputError
from d_emo.evaluation import measure, measurement

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "fid.py"


class MeanColour:
    """Stands in for a network; a white image breaks it."""

    name, dim, spatial_dim, published = "mean-colour", 3, 3, True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        means = images.double().mean(dim=(2, 3))
        return torch.where(means == 255, torch.nan, means)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": self(images), "spatial": images[:, :, 0, 0].double()}

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled / 100


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    for module in (measurement, reference):
        monkeypatch.setattr(module, "create_extractor", lambda *args, **kwargs: MeanColour())
    return partial(run_verb, "fid")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_images(tmp_path / "good", 4)


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (8, 8), suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(count).integers(0, 250, (count, *size, 3), dtype=np.uint8)
    for index, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{size[1]}px-{index}.{suffix}")
    return folder


def test_prints_and_writes(main: Callable, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    samples = write_images(tmp_path / "samples", 5, suffix="jpg")
    main(
        ["--samples", str(samples), "--reference", str(good), "--num-images", "3", "--output", str(tmp_path / "o.json")]
    )
    printed = capsys.readouterr()
    written = json.loads((tmp_path / "o.json").read_text())
    text, table = printed.out.split("\n\n")
    assert text.startswith(f"FID-3      {written['fid']:.2f}\nfeatures   mean-colour\nsamples    {samples}\n")
    assert table.splitlines()[2].startswith(f"| {written['fid']:.2f} | {samples} | {good} (4 images) | mean-colour |")
    assert "warning: FID falls" in printed.err and "warning: 3 of the 3 samples are JPEG" in printed.err
    assert written["num_samples"] == 3 and written["num_reference"] == 4 and len(written["warnings"]) == 2


# ---- what cannot be used: a function that makes it, and what the sentence must say -----------------------------------


def missing(at: Path) -> Path:
    return at / "nowhere"


def empty(at: Path) -> Path:
    (at / "class").mkdir(parents=True)
    (at / "class" / "notes.txt").write_text("none")
    return at


def plain_file(at: Path) -> Path:
    at.mkdir()
    (at / "set.tar").write_bytes(b"PK")
    return at / "set.tar"


def zip_none(at: Path) -> Path:
    at.mkdir()
    (at / "set.zip").write_bytes(b"PK")
    return at / "set.zip"


def zip_empty(at: Path) -> Path:
    at.mkdir()
    with zipfile.ZipFile(at / "set.zip", "w") as archive:
        archive.writestr("notes.txt", "none")
    return at / "set.zip"


def zip_damaged(at: Path) -> Path:
    write_images(at, 3)
    with zipfile.ZipFile(at / "set.zip", "w") as archive:
        for path in sorted(at.glob("*.png")):
            archive.write(path, f"class/{path.name}")
    data = bytearray((at / "set.zip").read_bytes())
    data[data.index(b"8px-1.png") + 100] ^= 255
    (at / "set.zip").write_bytes(data)
    return at / "set.zip"


def single(at: Path) -> Path:
    return write_images(at, 1)


def corrupt(at: Path) -> Path:
    (write_images(at, 3) / "cut.png").write_bytes((at / "8px-0.png").read_bytes()[:100])
    return at


def not_an_image(at: Path) -> Path:
    (write_images(at, 3) / "text.jpg").write_text("hello")
    return at


def mixed_sizes(at: Path) -> Path:
    write_images(at, 2)
    return write_images(at, 2, size=(8, 9))


def no_known_range(at: Path) -> Path:
    Image.fromarray(np.full((8, 8), 60_000, dtype=np.float32)).save(write_images(at, 2) / "deep.tif")
    return at


def broken_features(at: Path) -> Path:
    Image.new("RGB", (8, 8), "white").save(write_images(at, 2) / "white.png")
    return at


def npz(at: Path, **arrays: object) -> Path:
    at.mkdir()
    np.savez(at / "set.npz", **arrays)
    return at / "set.npz"


def images(count: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, (count, 8, 8, channels), dtype=np.uint8)


def npz_missing(at: Path) -> Path:
    return at / "nowhere.npz"


def npz_other_keys(at: Path) -> Path:
    return npz(at, pictures=images(), labels=np.arange(4))


def npz_floats(at: Path) -> Path:
    return npz(at, arr_0=images() / 255)


def npz_channels_first(at: Path) -> Path:
    return npz(at, arr_0=images().transpose(0, 3, 1, 2).copy())


def npz_single(at: Path) -> Path:
    return npz(at, arr_0=images(1))


def npz_no_archive(at: Path) -> Path:
    at.mkdir()
    np.save(at / "set.npz.npy", images())
    return (at / "set.npz.npy").rename(at / "set.npz")


def npz_cut(at: Path) -> Path:
    path = npz(at, arr_0=images())
    path.write_bytes(path.read_bytes()[:500])
    return path


def npz_damaged(at: Path) -> Path:
    path = npz(at, arr_0=images())
    data = bytearray(path.read_bytes())
    data[500] ^= 255
    path.write_bytes(data)
    return path


def npz_objects(at: Path) -> Path:
    return npz(at, arr_0=np.array([{"a": 1}, None], dtype=object))


BAD_SETS = [
    (missing, "nowhere does not exist"),
    (empty, "holds no images"),
    (plain_file, "set.tar is neither a folder of images nor a .zip or .npz file"),
    (zip_none, "set.zip is not an intact zip"),
    (zip_empty, "the zip .*set.zip holds no images"),
    (zip_damaged, "cannot read the image .*set.zip/class/8px-1.png"),
    (single, "holds 1 image; a covariance needs at least two"),
    (corrupt, "cannot read the image .*cut.png"),
    (not_an_image, "cannot read the image .*text.jpg"),
    (no_known_range, r"deep.tif \(its floating-point pixels are from 60000 to 60000, where viewers show 0 to 1\)"),
    (broken_features, "features of images 1 to 3 hold NaN"),
    (npz_missing, "nowhere.npz does not exist"),
    (npz_other_keys, "holds the keys labels, pictures; images are expected as arr_0"),
    (npz_floats, r"arr_0 of .* is float64 of shape \(4, 8, 8, 3\)"),
    (npz_channels_first, r"uint8 of shape \(4, 3, 8, 8\)"),
    (npz_single, "holds 1 image"),
    (npz_no_archive, "set.npz is not an intact .npz file"),
    (npz_cut, "set.npz is not an intact .npz file"),
    (npz_damaged, "set.npz is not an intact .npz file"),
    (npz_objects, "arr_0 of .* is object of shape"),
]


def test_a_reference_of_several_sizes_is_cropped_as_in_training(
    main: Callable, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    photos, cropped = tmp_path / "photos", tmp_path / "cropped"
    for folder in (photos, cropped):
        folder.mkdir()
    for index, size in enumerate([(20, 30), (16, 16), (8, 11)]):
        image = Image.fromarray(np.random.default_rng(index).integers(0, 250, (*size, 3), dtype=np.uint8))
        image.save(photos / f"{index}.png")
        centre_crop(image, 8).save(cropped / f"{index}.png")
    (photos / "film.mp4").touch()
    outputs = []
    for real in (photos, cropped):
        main(["--samples", str(good), "--reference", str(real), "--output", str(tmp_path / "o.json"),
              "--overwrite"])
        outputs.append((json.loads((tmp_path / "o.json").read_text()), capsys.readouterr()))
    (mixed, printed), (plain, _) = outputs
    assert mixed["fid"] == plain["fid"] and (mixed["reference_cropped"], plain["reference_cropped"]) == (8, None)
    assert f"{photos} (3 images of several sizes, cropped as in training to 8 x 8 px)" in printed.out
    assert "warning: of the reference, 1 file of other kinds left out: .mp4 1" in printed.err
    with pytest.raises(InputError, match="cannot be cropped to 10 x 8 px, which is no square"):
        main(["--samples", str(write_images(tmp_path / "wide", 3, size=(8, 10))), "--reference", str(photos)])


def test_samples_of_several_sizes_are_told_the_very_command(main: Callable, good: Path, tmp_path: Path) -> None:
    """And it works: what it writes, of pictures in no classes here, can be measured."""
    bad = mixed_sizes(tmp_path / "my photos")
    with pytest.raises(InputError, match="8px-0.png is 8 x 8 px but .*9px-0.png is 9 x 8 px") as raised:
        main(["--samples", str(bad), "--reference", str(good)])
    program, verb, *arguments = shlex.split(str(raised.value).split("`")[1])
    assert (program, verb, arguments[-1]) == ("d-emo", "reference", "my photos.npz")
    arguments[-1] = str(tmp_path / arguments[-1])
    run_verb("reference", arguments)
    main(["--samples", arguments[-1], "--reference", str(good)])


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("side", ["--samples", "--reference"])
def test_images_that_cannot_be_read_are_passed_over_where_that_is_asked_for(
    main: Callable, good: Path, tmp_path: Path, side: str, zipped: bool, capsys: pytest.CaptureFixture
) -> None:
    intact, holed = write_images(tmp_path / "intact", 5), write_images(tmp_path / "holed", 5)
    (holed / "8px-1a.png").write_bytes((good / "8px-0.png").read_bytes()[:120])  # its head is whole
    (holed / "8px-2a.jpg").write_text("hello")
    if zipped:
        with zipfile.ZipFile(tmp_path / "holed.zip", "w") as archive:
            for path in holed.iterdir():
                archive.write(path, path.name)
        holed = tmp_path / "holed.zip"
    other = {"--samples": "--reference", "--reference": "--samples"}[side]
    with pytest.raises(InputError, match=r"cannot read the image .*; --skip-corrupt passes over such images"):
        main([side, str(holed), other, str(good)])
    outputs = []
    for images in (intact, holed):
        main([side, str(images), other, str(good), "--skip-corrupt", "--output", str(tmp_path / "o.json"),
              "--overwrite"])  # fmt: skip
        outputs.append(json.loads((tmp_path / "o.json").read_text()))
    assert outputs[0]["fid"] == outputs[1]["fid"]
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert told.startswith(f"warning: of the {side[2:].removesuffix('s')}")
    assert "2 images passed over: cannot read the image" in told and "8px-1a.png" in told and "8px-2a.jpg" in told
    assert any("passed over" in each for each in outputs[1]["warnings"])


def test_a_reference_counts_no_image_twice_for_one_that_cannot_be_read(
    main: Callable, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    intact, holed = write_images(tmp_path / "intact", 5), write_images(tmp_path / "holed", 5)
    (holed / "8px-1a.png").write_bytes((good / "8px-0.png").read_bytes()[:120])
    files = []
    for folder in (intact, holed):
        files.append(tmp_path / f"{folder.name}.npz")
        run_verb("reference", ["--data-dir", str(folder), "--image-size", "8", "--output", str(files[-1]),
                               "--skip-corrupt"])  # fmt: skip
    one, two = map(np.load, files)
    assert all(np.array_equal(one[name], two[name]) for name in ("arr_0", "mu", "sigma", "num_images"))
    assert "left out   1 image: cannot read the image" in capsys.readouterr().out
    with pytest.raises(InputError, match="8px-1a.png.*--skip-corrupt passes over such images"):
        run_verb("reference", ["--data-dir", str(holed), "--image-size", "8", "--output", str(tmp_path / "o.npz")])


def test_a_set_of_which_nothing_can_be_read_is_refused(main: Callable, good: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("hello")
    with pytest.raises(InputError, match=r"none of the 1 images in .*bad could be read; the first: .*a\.png"):
        main(["--samples", str(tmp_path / "bad"), "--reference", str(good), "--skip-corrupt"])


@pytest.mark.parametrize("side", ["--samples", "--reference"])
@pytest.mark.parametrize(("make", "sentence"), BAD_SETS, ids=[make.__name__ for make, _ in BAD_SETS])
def test_bad_set(
    main: Callable, good: Path, tmp_path: Path, make: Callable[[Path], Path], sentence: str, side: str
) -> None:
    other = {"--samples": "--reference", "--reference": "--samples"}[side]
    with pytest.raises(InputError, match=sentence) as raised:
        main([side, str(make(tmp_path / "bad")), other, str(good), "--output", str(tmp_path / "o.json")])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("statistics", "sentence"),
    [
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, r"mu of shape \(5,\) .* have 3 dimensions"),
        ({"mu": np.zeros(3), "sigma": np.eye(5)}, r"sigma of shape \(5, 5\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "must be finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3, dtype=int)}, "must be finite floating-point"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "negative eigenvalue"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_images": "many"}, "num_images of .* must be one whole number"),
        ({"mu": np.array([None] * 3), "sigma": np.eye(3)}, "not an intact .npz file"),
    ],
)
def test_bad_stored_statistics(main: Callable, good: Path, tmp_path: Path, statistics: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        main(["--samples", str(good), "--reference", str(npz(tmp_path / "r", **statistics))])


def test_stored_statistics_are_no_samples(main: Callable, good: Path, tmp_path: Path) -> None:
    path = str(npz(tmp_path / "r", mu=np.zeros(3), sigma=np.eye(3)))
    with pytest.raises(InputError, match="holds the keys mu, sigma; images are expected as arr_0"):
        main(["--samples", path, "--reference", path])
    with pytest.raises(InputError, match="without the name of their features, which are then Inception's, not emov2:x"):
        main(["--features", "emov2:x", "--samples", str(good), "--reference", path])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--num-images", "5"], "5 images were asked for .*good holds 4"),
        (["--num-images", "1"], "1 images were asked for .* at least two"),
        (["--num-images", "0"], "--num-images must be at least 1, not 0"),
        (["--num-images", "many"], "num.images"),
        (["--batch-size", "0"], "--batch-size must be at least 1, not 0"),
        (["--output", "{tmp}/none/o.json"], "the folder .*none does not exist"),
        (["--output", "{tmp}/good"], "is a folder, where a file is to be written"),
    ],
)
def test_bad_argument(main: Callable, good: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    arguments = [each.replace("{tmp}", str(tmp_path)) for each in arguments]
    with pytest.raises(InputError, match=sentence):
        main(["--samples", str(good), "--reference", str(good), *arguments])


@pytest.mark.parametrize("features", ["clip", "emov2", "emov2:", "Inception", ""])
def test_unknown_features(good: Path, features: str) -> None:
    with pytest.raises(InputError, match="use inception or emov2:SNAPSHOT"):
        measure(good, good, features=features)


def test_weights_that_would_be_ignored(good: Path) -> None:
    with pytest.raises(InputError, match="`inception_weights` has no use"):
        measure(good, good, features="emov2:x", inception_weights="w.pth")


def test_exit_code_and_nothing_overwritten(good: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.json"
    output.write_text("precious")
    run = subprocess.run(
        [sys.executable, SCRIPT, "--samples", good, "--reference", good, "--output", output],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == f"error: --output {output} exists and is not overwritten; name another, or give --overwrite\n"
    assert run.stdout == "" and output.read_text() == "precious"
