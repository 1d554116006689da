"""The whole measurement, on features that can be repeated by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_sets import ColourFeatures, make_pixels, write_folder
from PIL import Image

from d_emo.errors import InputError
from d_emo.evaluation import measure


def test_fid_of_a_set_with_itself_is_zero(tmp_path: Path, colours: ColourFeatures) -> None:
    folder = write_folder(tmp_path / "set", make_pixels(9))
    assert 0 <= measure(folder, folder, progress=False).fid < 1e-9


def test_fid_by_hand(tmp_path: Path, colours: ColourFeatures) -> None:
    pixels = make_pixels(30) // 2
    samples, reference = write_folder(tmp_path / "s", pixels + 50), write_folder(tmp_path / "r", pixels)
    result = measure(samples, reference, output=tmp_path / "fid.json", batch_size=7, progress=False)
    assert result.fid == pytest.approx(12 * 50**2, rel=1e-12)  # all 12 features shifted by 50
    assert str(result).splitlines() == [
        "FID-30     30000.00",
        "features   colours",
        f"samples    {samples}",
        f"reference  {reference} (30 images)",
        "sampling   not recorded",
    ]
    assert result.to_markdown().splitlines() == [
        "| FID-30 | samples | reference | features | sampler | steps | guidance | seed | labels | weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| 30000.00 | {samples} | {reference} (30 images) | colours |" + " not recorded |" * 6,
    ]
    (warning,) = result.warnings
    assert "FID-30" in warning
    written = json.loads((tmp_path / "fid.json").read_text())
    assert written.pop("warnings") == [warning]
    assert written == {
        "fid": result.fid, "num_samples": 30, "num_reference": 30, "num_compared": None, "features": "colours",
        "samples": str(samples), "reference": str(reference), "sampling": {}, "images_per_second": None,
        "reference_cropped": None,
    }  # fmt: skip


def test_reader_is_warned(tmp_path: Path, colours: ColourFeatures) -> None:
    colours.published = False
    folder = write_folder(tmp_path / "s", make_pixels(4))
    Image.open(folder / "0000.png").save(folder / "0000.jpeg")
    (folder / "0000.png").unlink()
    warnings = " | ".join(measure(folder, write_folder(tmp_path / "r", make_pixels(4, size=16))).warnings)
    for expected in [
        "FID-4 compares",
        "1 of the 4 samples are JPEG",
        "8 x 8 px and the reference 16 x 16",
        "not the publ",
    ]:
        assert expected in warnings
    backwards = " | ".join(measure(tmp_path / "r", folder).warnings)
    assert "JPEG" not in backwards  # references may be what they are


def test_stored_statistics_replace_the_images_of_a_reference(tmp_path: Path, colours: ColourFeatures) -> None:
    """ADM's reference files hold 10,000 images for precision and recall only; FID is against their mu and sigma."""
    features = colours(torch.from_numpy(make_pixels(20, seed=1)).permute(0, 3, 1, 2)).numpy()
    np.savez(
        tmp_path / "r.npz",
        arr_0=make_pixels(5, seed=2), mu=features.mean(axis=0).astype(np.float32), sigma=np.cov(features, rowvar=False),
    )  # fmt: skip
    samples = write_folder(tmp_path / "s", make_pixels(20, seed=1))
    result = measure(samples, tmp_path / "r.npz", progress=False)
    assert result.fid < 1e-6 and result.num_reference is None
    assert f"{tmp_path / 'r.npz'} (stored statistics)" in str(result)
    by_images = measure(samples, tmp_path / "r.npz", features="emov2:x", progress=False)
    assert by_images.fid > 1 and by_images.num_reference == 5


def test_equal_features_are_pointed_out(tmp_path: Path, colours: ColourFeatures) -> None:
    """An untrained network may give one and the same vector for all images: distance 0 for any two sets."""
    varied = write_folder(tmp_path / "varied", make_pixels(4))
    equal = write_folder(tmp_path / "equal", make_pixels(1).repeat(4, axis=0))
    with pytest.raises(InputError, match="all 4 samples have the same features"):
        measure(equal, varied, output=tmp_path / "o.json", progress=False)
    assert not (tmp_path / "o.json").exists()
    assert measure(varied, varied, progress=False).fid < 1e-9
    with pytest.raises(InputError, match="the reference .*equal have the same features"):
        measure(varied, equal, progress=False)


def test_num_images_takes_samples_only(tmp_path: Path, colours: ColourFeatures) -> None:
    samples, reference = write_folder(tmp_path / "s", make_pixels(9)), write_folder(tmp_path / "r", make_pixels(6))
    result = measure(samples, reference, num_images=7, progress=False)
    assert (result.num_samples, result.num_reference) == (7, 6)


def test_the_inception_score_needs_no_reference_and_bears_one(tmp_path: Path, colours: ColourFeatures) -> None:
    folder = write_folder(tmp_path / "s", make_pixels(12))
    alone, beside = (measure(folder, each, metrics=["isc"], progress=False) for each in (None, folder))
    assert alone == beside and alone.reference is None and "reference" not in str(alone)


def test_foreign_settings_beside_the_samples_are_passed_over(tmp_path: Path, colours: ColourFeatures) -> None:
    folder = write_folder(tmp_path / "s", make_pixels(4))
    (folder / "settings.json").write_text('{"sampling": "by hand"}')
    assert measure(folder, folder, progress=False).sampling == {}
