"""Image sources against each other: folders, zips, ``.npz`` files, batches."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import ColourFeatures, assert_close, make_pixels, read_all, write_folder
from PIL import Image

from d_emo.evaluation import FeatureStatistics, open_images
from d_emo.evaluation.npz import choose_evenly


def test_folder_gives_every_image_of_every_class_in_path_order(tmp_path: Path) -> None:
    pixels = make_pixels(5)
    for name, each in zip(["n02/b.BMP", "n01/z.png", "n02/a.PNG", "n01/deep/c.webp", "n03.png"], pixels, strict=True):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    (tmp_path / "n01" / "notes.txt").write_text("not an image")
    images = open_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in images.files] == [
        "n01/deep/c.webp", "n01/z.png", "n02/a.PNG", "n02/b.BMP", "n03.png"
    ]  # fmt: skip
    assert (images.num_images, images.num_jpegs, images.image_size) == (5, 0, (8, 8))
    assert images.left_out == "1 file of other kinds left out: .txt 1"
    expected = torch.from_numpy(pixels[[3, 1, 2, 0, 4]]).permute(0, 3, 1, 2)
    assert torch.equal(read_all(tmp_path), expected)


def test_linked_class_folders_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", make_pixels(3))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(read_all(tmp_path / "set")) == 3


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg")])
def test_other_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    pixels = make_pixels(2, cell=8)  # one colour each: even JPEG and a palette keep it
    for index, each in enumerate(pixels):
        Image.fromarray(each).convert(mode).save(tmp_path / f"{index}.{suffix}", quality=100)
    images = open_images(tmp_path)
    assert images.num_jpegs == 2 * (suffix == "jpg")
    expected = [np.array(Image.fromarray(each).convert(mode).convert("RGB")) for each in pixels]
    expected = torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2)
    torch.testing.assert_close(read_all(tmp_path).int(), expected.int(), rtol=0, atol=3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("packed", [False, True])
def test_npz_equals_folder(tmp_path: Path, packed: bool) -> None:
    pixels = make_pixels(10)
    pixels = np.concatenate([pixels, pixels], axis=2)  # 8 x 16: sides must not be mixed up
    (np.savez_compressed if packed else np.savez)(tmp_path / "set.npz", pixels)
    folder = write_folder(tmp_path / "set", pixels)
    assert open_images(tmp_path / "set.npz").image_size == open_images(folder).image_size == (16, 8)
    assert torch.equal(read_all(tmp_path / "set.npz"), read_all(folder))
    assert torch.equal(read_all(tmp_path / "set.npz", num_images=4), read_all(folder, num_images=4))


def test_zip_equals_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", make_pixels(5))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in reversed(sorted(folder.iterdir())):
            archive.write(path, f"class/{path.name}")
        archive.write(path, "__MACOSX/class/._0000.png")
    images = open_images(tmp_path / "set.zip")
    assert (images.num_images, images.num_jpegs, images.image_size) == (5, 0, (8, 8))
    assert torch.equal(read_all(tmp_path / "set.zip"), read_all(folder))
    assert torch.equal(read_all(tmp_path / "set.zip", num_images=2), read_all(folder, num_images=2))


def test_a_part_of_a_set_is_spread_over_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", make_pixels(10))
    chosen = open_images(folder, num_images=4).files
    numbers = [int(path.stem) for path in chosen]
    assert len(numbers) == 4 and all(low <= number <= high for number, low, high in zip(
        numbers, (0, 2, 5, 7), (1, 4, 6, 9), strict=True
    ))
    assert len({index % 10 for index in choose_evenly(1000, 100, "a set whose classes go round")}) == 10
    assert len(set(open_images(folder, num_images=9).files)) == 9


def statistics_of(source: Path | Iterator[torch.Tensor], batch_size: int) -> FeatureStatistics:
    statistics, extractor = FeatureStatistics(ColourFeatures.dim), ColourFeatures()
    for batch in open_images(source).batches(batch_size) if isinstance(source, Path) else source:
        statistics.update(extractor(batch))
    return statistics


def test_npz_is_never_whole_in_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", make_pixels(500, size=64))  # 6.1 MB
    tracemalloc.start()
    statistics = statistics_of(tmp_path / "set.npz", 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statistics.count == 500
    assert peak < 2e6


def test_statistics_do_not_depend_on_file_names_or_batches(tmp_path: Path) -> None:
    pixels = make_pixels(11)
    one = statistics_of(write_folder(tmp_path / "a", pixels), 3)
    two = statistics_of(write_folder(tmp_path / "b", pixels[::-1]), 4)
    features = ColourFeatures()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert_close(one, features)
    assert_close(two, features)
    assert_close(statistics_of(iter(torch.from_numpy(pixels).permute(0, 3, 1, 2).split(4)), 1), features)
