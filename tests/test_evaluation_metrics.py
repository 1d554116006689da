"""Metrics against closed forms, sets with known answers, and torch-fidelity on the same folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from evaluation_sets import ColourFeatures, RegisteredColours, as_batch, make_pixels, write_folder
from torch_fidelity.metric_isc import isc_features_to_metric

from d_emo.errors import InputError
from d_emo.evaluation import InceptionScore, kernel_distance, measure, metrics, precision_recall
from d_emo.evaluation.metrics import FeatureRows

ALL = ("fid", "sfid", "isc", "prc", "kid")


@pytest.fixture(scope="module", autouse=True)
def registered() -> str:
    if "colours" not in torch_fidelity.utils.FEATURE_EXTRACTORS_REGISTRY:
        torch_fidelity.register_feature_extractor("colours", RegisteredColours)
    return "colours"


def test_every_metric_equals_torch_fidelity(tmp_path: Path, colours: ColourFeatures) -> None:
    samples = write_folder(tmp_path / "s", make_pixels(60, cell=2))
    reference = write_folder(tmp_path / "r", make_pixels(45, cell=4, seed=1) // 2 + 40)
    ours = measure(samples, reference, metrics=("fid", "isc", "prc", "kid"), batch_size=7, progress=False)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(reference), fid=True, isc=True, prc=True, kid=True, kid_subset_size=45,
        feature_extractor="colours", cuda=False, cache=False, verbose=False, save_cpu_ram=True, batch_size=16,
    )  # fmt: skip
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "precision": "precision",
        "recall": "recall",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
    }
    for mine, peer in names.items():
        assert ours.values[mine] == pytest.approx(theirs[peer], rel=1e-6), mine
    assert ours.fid > 1 and ours.kid > 0.1 and ours.inception_score > 1.01  # far from the values of equal sets
    assert 0 < ours.precision < 1 and 0 < ours.recall < 1


def test_spatial_distance_by_hand(tmp_path: Path, colours: ColourFeatures) -> None:
    pixels = make_pixels(30, cell=2) // 2
    moved = pixels.copy()
    moved[:, :2, :2, 0] += 50
    folders = [write_folder(tmp_path / name, each) for name, each in (("a", pixels), ("b", moved))]
    result = measure(*folders, metrics=("sfid",), progress=False)
    assert result.sfid == pytest.approx(4 * 50**2, rel=1e-9) and "fid" not in result.values


def test_a_set_measured_against_itself(tmp_path: Path, colours: ColourFeatures) -> None:
    folder = write_folder(tmp_path / "set", make_pixels(12))
    result = measure(folder, folder, metrics=ALL, progress=False)
    assert 0 <= result.fid < 1e-9 and 0 <= result.sfid < 1e-9
    assert result.precision == result.recall == 1
    text = str(result)
    for name in ("FID-12 ", "sFID-12 ", "IS-12 ", "precision-12 ", "recall-12 ", "KID-12 "):
        assert f"\n{name}" in f"\n{text}"


def test_order_of_files_and_batches_does_not_matter(tmp_path: Path, colours: ColourFeatures) -> None:
    pixels, reference = make_pixels(25), write_folder(tmp_path / "r", make_pixels(20, seed=1))
    options = {"metrics": ("fid", "sfid", "prc"), "progress": False}
    one = measure(write_folder(tmp_path / "a", pixels), reference, batch_size=25, **options)
    two = measure(write_folder(tmp_path / "b", pixels[::-1]), reference, batch_size=4, **options)
    assert one.values == pytest.approx(two.values, rel=1e-9)
    np.savez(tmp_path / "c.npz", pixels)
    assert measure(tmp_path / "c.npz", reference, batch_size=3, **options).values == pytest.approx(one.values, rel=1e-9)


# ---- Inception Score -------------------------------------------------------------------------------------------------


def score(logits: torch.Tensor, batch_size: int = 64) -> dict[str, float]:
    streamed = InceptionScore(len(logits))
    for batch in logits.split(batch_size):
        streamed.update(batch)
    return streamed.result()


@pytest.mark.parametrize("batch_size", [1, 7, 103])
def test_streamed_inception_score_equals_one_shot(batch_size: int) -> None:
    logits = 3 * torch.randn(103, 9, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits)
    measured = score(logits, batch_size)
    assert measured["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert measured["inception_score_std"] == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_of_known_classes() -> None:
    assert score(torch.zeros(50, 4))["inception_score"] == pytest.approx(1, rel=1e-12)  # no idea about any image
    sure = 1e4 * torch.nn.functional.one_hot(torch.arange(4000) % 4).float()
    assert score(sure)["inception_score"] == pytest.approx(4, rel=1e-2)  # sure, and all classes alike in a split
    assert score(sure[::4])["inception_score"] == pytest.approx(1, rel=1e-12)  # sure, but always of the same


def test_few_images_are_refused(tmp_path: Path, colours: ColourFeatures) -> None:
    few, many = write_folder(tmp_path / "few", make_pixels(3)), write_folder(tmp_path / "many", make_pixels(10))
    with pytest.raises(InputError, match=r"3 images are too few for Inception Score \(isc\); it needs at least 10"):
        measure(few, None, metrics=["isc"], progress=False)
    for pair in ((few, many), (many, few)):
        with pytest.raises(InputError, match="3 images are too few for precision and recall .* at least 4"):
            measure(*pair, metrics=["prc"], progress=False)
    assert measure(many, few, metrics=("fid", "isc"), progress=False).inception_score == pytest.approx(1)  # one a split


# ---- precision, recall, KID ------------------------------------------------------------------------------------------


def cluster(count: int, centre: float, seed: int = 0) -> torch.Tensor:
    return centre + torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def test_precision_and_recall_of_known_sets() -> None:
    near, far = cluster(40, 0), cluster(40, 1000, seed=1)
    half = torch.cat([cluster(40, 0), cluster(40, 1000, seed=1)])
    assert precision_recall(near, far) == {"precision": 0, "recall": 0}
    assert precision_recall(near, near) == {"precision": 1, "recall": 1}
    assert precision_recall(near, half) == {"precision": 1, "recall": 0.5}  # a mode is missing
    assert precision_recall(half, near) == {"precision": 0.5, "recall": 1}  # half is garbage


def test_precision_by_hand() -> None:
    """Points on a line: 0, 1, 2, 3 reach 3, 2, 2, 3 far (their third neighbours)."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[-3.0], [-3.1], [6.0], [6.1], [1.5]])
    assert precision_recall(samples, reference)["precision"] == pytest.approx(3 / 5)


def test_precision_and_recall_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = cluster(90, 0), cluster(70, 1, seed=1)
    whole = precision_recall(samples, reference)
    monkeypatch.setattr(metrics, "DISTANCES_AT_ONCE", 1000)
    assert precision_recall(samples, reference) == whole and 0 < whole["recall"] < 1


def test_kernel_distance_by_hand() -> None:
    """All of both sets in every subset: the unbiased estimate over the cubic kernel, written out."""
    first, second = cluster(20, 0).double(), cluster(20, 1, seed=1).double()

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / 3 + 1) ** 3

    within = [(kernel(x, x).sum() - kernel(x, x).trace()) / (20 * 19) for x in (first, second)]
    expected = within[0] + within[1] - 2 * kernel(first, second).mean()
    measured = kernel_distance(first.float(), second.float())
    assert measured["kid"] == pytest.approx(float(expected), rel=1e-5) and measured["kid_subset_size"] == 20


def test_rows_are_kept_on_disk_in_order(tmp_path: Path) -> None:
    features = torch.arange(60.0).view(20, 3)
    rows = FeatureRows(3, [0, 4, 5, 11, 19], tmp_path / "rows")
    for batch in features.split(6):
        rows.update(batch)
    assert torch.equal(rows.tensor(), features[[0, 4, 5, 11, 19]])
    assert (tmp_path / "rows").stat().st_size == 5 * 3 * 4


def test_colours_of_the_two_libraries_agree() -> None:
    images = as_batch(make_pixels(3))
    pooled, logits = RegisteredColours("colours", ["pooled", "logits"])(images)
    assert torch.equal(pooled, ColourFeatures()(images).float()) and logits.std() > 0.1
