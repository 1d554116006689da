"""References: what is measured against stored statistics, what against images, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_sets import ColourFeatures, as_batch, make_pixels, write_folder

from d_emo.data import spread
from d_emo.errors import InputError
from d_emo.evaluation import measure, reference, write_reference

ALL = ("fid", "sfid", "isc", "prc", "kid")


def write(path: Path, pixels: np.ndarray, kept: int, extractor: ColourFeatures | None = None) -> Path:
    write_reference(
        path, as_batch(pixels).split(7), extractor or ColourFeatures(), num_images=len(pixels), image_size=(8, 8),
        kept_images=kept,
    )  # fmt: skip
    return path


def test_written_reference_is_in_adms_layout(tmp_path: Path) -> None:
    pixels = make_pixels(40)
    write(tmp_path / "r.npz", pixels, 10)
    features = ColourFeatures().extract(as_batch(pixels))
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:
        assert set(archive) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "num_images", "features"}
        assert np.array_equal(archive["arr_0"], pixels[spread(40, 10)])
        for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            np.testing.assert_allclose(archive[mean], features[name].numpy().mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(archive[covariance], np.cov(features[name].numpy(), rowvar=False), rtol=1e-9)
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_written_reference_measures_as_its_images(tmp_path: Path, colours: ColourFeatures) -> None:
    pixels, samples = make_pixels(30, seed=1), write_folder(tmp_path / "s", make_pixels(20))
    by_folder = measure(samples, write_folder(tmp_path / "r", pixels), metrics=ALL, progress=False)
    by_file = measure(samples, write(tmp_path / "r.npz", pixels, 30), metrics=ALL, progress=False)
    assert by_file.values == pytest.approx(by_folder.values, rel=1e-9)
    assert by_file.num_reference == by_folder.num_reference == 30
    other_images = write(tmp_path / "few.npz", pixels, 5)
    result = measure(samples, other_images, metrics=ALL, progress=False)
    assert (result.num_reference, result.num_compared) == (30, 5)
    assert result.fid == by_file.fid and result.kid != by_file.kid
    assert "few.npz (30 images, precision, recall and KID: 5 images)" in str(result)


def test_no_images_are_stored_if_none_are_wanted(tmp_path: Path, colours: ColourFeatures) -> None:
    path = write(tmp_path / "r.npz", make_pixels(9), 0)
    samples = write_folder(tmp_path / "s", make_pixels(9))
    assert measure(samples, path, metrics=("fid", "sfid"), progress=False).fid < 1e-9
    with pytest.raises(InputError, match="statistics but no images"):
        measure(samples, path, metrics=("fid", "kid"), progress=False)


def test_a_large_reference_is_compared_in_part(tmp_path: Path, colours: ColourFeatures, monkeypatch) -> None:
    monkeypatch.setattr(reference, "COMPARED", 6)
    samples, pixels = write_folder(tmp_path / "s", make_pixels(12)), make_pixels(18, seed=1)
    third = write_folder(tmp_path / "third", pixels[spread(18, 6)])
    folder = write_folder(tmp_path / "r", pixels)
    expected = measure(samples, third, metrics=["kid"], progress=False)
    seen, extract = [], ColourFeatures.extract
    monkeypatch.setattr(ColourFeatures, "extract", lambda self, new: seen.append(len(new)) or extract(self, new))
    assert measure(samples, folder, metrics=["kid"], progress=False).kid == pytest.approx(expected.kid, rel=1e-9)
    assert sum(seen) == 12 + 6  # the network sees no more of the reference than is needed
    both = measure(samples, folder, metrics=("fid", "kid"), progress=False)
    assert both.kid == pytest.approx(expected.kid, rel=1e-9)
    assert (both.num_reference, both.num_compared) == (18, 6)


def test_statistics_name_their_features(tmp_path: Path, colours: ColourFeatures) -> None:
    samples, pixels = write_folder(tmp_path / "s", make_pixels(12)), make_pixels(18, seed=1)
    colours.name = "emov2:here/snap@12345678"
    path = write(tmp_path / "r.npz", pixels, 6, colours)
    colours.name = "emov2:moved@12345678"
    assert measure(samples, path, features="emov2:moved", progress=False).num_reference == 18
    for other in ("emov2:here/snap@87654321", "inception-v3-compat@12345678"):
        colours.name = other
        with pytest.raises(InputError, match=f"features emov2:here/snap@12345678, not of {other}.*`d-emo "):
            measure(samples, path, features="emov2:x", progress=False)


def test_what_a_reference_lacks(tmp_path: Path, colours: ColourFeatures) -> None:
    samples = write_folder(tmp_path / "s", make_pixels(12))
    np.savez(tmp_path / "r.npz", mu=np.zeros(12), sigma=np.eye(12), arr_0=make_pixels(5))
    with pytest.raises(InputError, match="not mu_s and sigma_s, which sfid needs; leave it out"):
        measure(samples, tmp_path / "r.npz", metrics=["sfid"], progress=False)
    np.savez(tmp_path / "r.npz", mu=np.zeros(12), sigma=np.eye(12), mu_s=np.zeros(5), sigma_s=np.eye(5))
    with pytest.raises(InputError, match=r"mu_s of shape \(5,\) .* have 4 dimensions"):
        measure(samples, tmp_path / "r.npz", metrics=["sfid"], progress=False)
    with pytest.raises(InputError, match="FID of spatial features .sfid. cannot be had of emov2:x; leave sfid out"):
        measure(samples, samples, metrics=["sfid"], features="emov2:x", progress=False)
    with pytest.raises(InputError, match="fid of `metrics` compares with real images; name a `reference`"):
        measure(samples, None, metrics=("isc", "fid"), progress=False)
    assert measure(samples, None, metrics=["isc"], progress=False).inception_score > 1


def test_a_broken_writer_leaves_nothing(tmp_path: Path) -> None:
    def batches():
        yield as_batch(make_pixels(4))
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        write_reference(
            tmp_path / "r.npz", batches(), ColourFeatures(), num_images=9, image_size=(8, 8), kept_images=9
        )
    assert list(tmp_path.iterdir()) == []


def test_reference_images_of_one_colour_are_refused(tmp_path: Path, colours: ColourFeatures) -> None:
    blank = write_folder(tmp_path / "blank", np.zeros((5, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="the reference .*blank have the same features"):
        measure(write_folder(tmp_path / "s", make_pixels(5)), blank, progress=False)
