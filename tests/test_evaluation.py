"""Statistics against closed forms and numpy, image sources against each other, FID against torch-fidelity."""

from __future__ import annotations

import json
import pickle
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from d_emo.config import InputError
from d_emo.evaluation import (
    ClassifierFeatures,
    FeatureStatistics,
    InceptionFeatures,
    class_accuracy,
    compute_statistics,
    create_extractor,
    fid,
    frechet_distance,
    measure_fid,
    open_images,
)


class ColourFeatures:
    """Stands in for a network: means of 2 x 2 patches, linear in the pixels, so that the sums are easy to repeat."""

    name, dim, published = "colours", 12, True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> ColourFeatures:
    """Let ``measure_fid`` use ColourFeatures, whatever features it is asked for."""
    extractor = ColourFeatures()
    monkeypatch.setattr(fid, "create_extractor", lambda *args, **kwargs: extractor)
    return extractor


def make_pixels(count: int, *, seed: int = 0, size: int = 8, cell: int = 1) -> np.ndarray:
    """Random squares of ``cell`` px. Shape: (count, size, size, 3) uint8."""
    shape = (count, size // cell, size // cell, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return coarse.repeat(cell, axis=1).repeat(cell, axis=2)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{index:04d}.png")
    return folder


def read_all(source: object, **options: int) -> torch.Tensor:
    return torch.cat(list(open_images(source, **options).batches(3)))


# ---- Frechet distance ------------------------------------------------------------------------------------------------


def random_covariance(dim: int, rank: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((dim, rank))
    return factor @ factor.T


def test_distance_in_one_dimension() -> None:
    assert frechet_distance([1.0], [[4.0]], [0.0], [[1.0]]) == pytest.approx(1 + (2 - 1) ** 2, rel=1e-14)
    assert frechet_distance([3.0], [[0.0]], [0.0], [[0.0]]) == pytest.approx(9, rel=1e-14)


def test_distance_of_diagonal_covariances_with_zeros() -> None:
    first, second = np.array([4.0, 0.0, 9.0, 0.0]), np.array([1.0, 16.0, 0.0, 0.0])
    expected = 4 * 0.25 + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    measured = frechet_distance(np.full(4, 0.5), np.diag(first), np.zeros(4), np.diag(second))
    assert measured == pytest.approx(expected, rel=1e-13)


def test_distance_of_matrices_that_do_not_commute() -> None:
    first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
    root_trace = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    expected = np.trace(first) + np.trace(second) - 2 * root_trace  # Cayley-Hamilton, 2 x 2
    assert frechet_distance([0, 0], first, [0, 0], second) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [5, 200])
def test_distance_to_a_symmetric_linear_image(rank: int) -> None:
    """For A symmetric and positive, x -> Ax is the optimal map, so that the distance is E|x - Ax|^2."""
    mean, sigma = np.linspace(-1, 1, 200), random_covariance(200, rank, seed=1)
    a = random_covariance(200, 300, seed=2) / 300
    move = a - np.eye(200)
    expected = (move @ mean) @ (move @ mean) + np.trace(move @ sigma @ move)
    assert frechet_distance(mean, sigma, a @ mean, a @ sigma @ a) == pytest.approx(expected, rel=1e-9)


def test_distance_of_rank_one_covariances_is_exact() -> None:
    """Roots of rounded zeros, 1e-8 each, would add up to 1e-5 of the traces here."""
    u, v = np.random.default_rng(0).standard_normal((2, 512))
    zero = np.zeros(512)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [3, 64])
def test_distance_to_itself_is_zero_and_order_is_free(rank: int) -> None:
    mean, sigma, other = np.arange(64.0), random_covariance(64, rank, seed=3), random_covariance(64, 9, seed=4)
    assert 0 <= frechet_distance(mean, sigma, mean, sigma) < 1e-12 * np.trace(sigma)
    forth, back = frechet_distance(mean, sigma, -mean, other), frechet_distance(-mean, other, mean, sigma)
    assert forth == pytest.approx(back, rel=1e-13)


def test_distance_never_turns_negative() -> None:
    sigmas = [random_covariance(40, 60, seed=seed) for seed in range(20)]
    distances = [frechet_distance(np.zeros(40), sigma, np.zeros(40), sigma) for sigma in sigmas]
    assert min(distances) == 0


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (([0.0], [[1.0]]), "over 2 and over 1 features"),
        (([0.0, np.nan], np.eye(2)), "NaN or infinite"),
        (([0.0, 0.0], np.eye(3)), "do not belong together"),
        (([0.0, 0.0], np.diag([1.0, -0.5])), "negative eigenvalue -0.5"),
    ],
)
def test_distance_refuses(second: tuple, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        frechet_distance([0.0, 0.0], np.eye(2), *second)


# ---- streaming statistics --------------------------------------------------------------------------------------------


def gather(*batches: torch.Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def make_features(count: int = 300, dim: int = 7) -> torch.Tensor:
    """Far from the origin, where E[xx'] - E[x]E[x]' would lose six digits."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return 1000 + torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mixing


def assert_close(statistics: FeatureStatistics, features: torch.Tensor) -> None:
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(axis=0), rtol=1e-12)
    expected = np.cov(features.numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_streamed_statistics_equal_one_shot(batch_size: int) -> None:
    features = make_features()
    assert_close(gather(*features.split(batch_size)), features)


def test_merged_statistics_equal_the_whole() -> None:
    features = make_features()
    first, second = gather(*features[:110].split(32)), gather(features[110:])
    first.merge(second)
    assert_close(first, features)
    empty = FeatureStatistics(7)
    empty.update(torch.ones(0, 7))
    empty.merge(FeatureStatistics(7))
    empty.merge(first)
    empty.merge(FeatureStatistics(7))
    assert_close(empty, features)
    assert_close(second, features[110:])  # merging reads only


def test_order_of_features_does_not_matter() -> None:
    features = make_features()
    shuffled = features[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    assert_close(gather(*shuffled.split(32)), features)


def test_float32_features_are_summed_in_float64() -> None:
    features = (make_features() * 100).float()
    assert_close(gather(*features.split(13)), features.double())


def test_statistics_hand_out_copies() -> None:
    statistics = gather(make_features())
    statistics.mean.zero_()
    statistics.covariance.zero_()
    assert_close(statistics, make_features())


def test_statistics_refuse() -> None:
    with pytest.raises(InputError, match="features of images 301 to 302 hold NaN or infinite"):
        gather(make_features(), torch.tensor([[1.0] * 7, [float("nan")] * 7]))
    with pytest.raises(InputError, match="over 1 images .* at least 2"):
        _ = gather(torch.ones(1, 7)).covariance
    with pytest.raises(InputError, match="over 0 images"):
        _ = FeatureStatistics(7).mean
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        FeatureStatistics(7).update(torch.ones(4, 6))
    with pytest.raises(ValueError, match="over 6 features"):
        FeatureStatistics(7).merge(FeatureStatistics(6))


# ---- image sources ---------------------------------------------------------------------------------------------------


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
    expected = torch.from_numpy(pixels[[3, 1, 2, 0, 4]]).permute(0, 3, 1, 2)
    assert torch.equal(read_all(tmp_path), expected)


def test_linked_class_folders_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", make_pixels(3))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "class").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(read_all(tmp_path / "set")) == 3


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(make_pixels(1)[0])
    for mode, suffix in [("RGB", "png"), ("RGBA", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg")]:
        image.convert(mode).save(tmp_path / f"{mode}.{suffix}")
    images = open_images(tmp_path)
    assert images.num_jpegs == 1
    by_mode = dict(zip([path.stem for path in images.files], read_all(tmp_path), strict=True))
    assert torch.equal(by_mode["RGBA"], by_mode["RGB"])
    assert torch.equal(by_mode["L"], torch.from_numpy(np.array(image.convert("L"))).expand(3, 8, 8))


@pytest.mark.parametrize("packed", [False, True])
def test_npz_equals_folder(tmp_path: Path, packed: bool) -> None:
    pixels = make_pixels(10)
    pixels = np.concatenate([pixels, pixels], axis=2)  # 8 x 16: sides must not be mixed up
    (np.savez_compressed if packed else np.savez)(tmp_path / "set.npz", pixels)
    folder = write_folder(tmp_path / "set", pixels)
    assert open_images(tmp_path / "set.npz").image_size == open_images(folder).image_size == (16, 8)
    assert torch.equal(read_all(tmp_path / "set.npz"), read_all(folder))
    assert torch.equal(read_all(tmp_path / "set.npz", num_images=4), read_all(folder, num_images=4))


def test_a_part_of_a_set_is_spread_over_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", make_pixels(10))
    chosen = open_images(folder, num_images=4).files
    assert [path.stem for path in chosen] == ["0000", "0002", "0005", "0007"]
    assert len(set(open_images(folder, num_images=9).files)) == 9


def test_npz_is_never_whole_in_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", make_pixels(500, size=64))  # 6.1 MB
    tracemalloc.start()
    statistics = compute_statistics(tmp_path / "set.npz", ColourFeatures(), batch_size=16, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statistics.count == 500
    assert peak < 2e6


def test_batches_made_on_the_spot() -> None:
    pixels = torch.from_numpy(make_pixels(10)).permute(0, 3, 1, 2)
    whole = compute_statistics(pixels.split(4), ColourFeatures(), progress=False)
    features = ColourFeatures()(pixels)
    assert_close(whole, features)
    part = compute_statistics((batch for batch in pixels.split(4)), ColourFeatures(), num_images=6, progress=False)
    assert_close(part, features[:6])


@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ([torch.zeros(2, 3, 8, 8)], "must be uint8"),
        ([torch.zeros(2, 1, 8, 8, dtype=torch.uint8)], r"\(2, 1, 8, 8\)"),
        ([torch.zeros(2, 3, side, side, dtype=torch.uint8) for side in (8, 9)], r"\(8, 8\) and of \(9, 9\) px"),
        ([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], "5 images were asked for, but only 2 came"),
    ],
)
def test_batches_refused(batches: list[torch.Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        compute_statistics(batches, ColourFeatures(), num_images=5, progress=False)


def test_statistics_do_not_depend_on_file_names_or_batches(tmp_path: Path) -> None:
    pixels = make_pixels(11)
    one = compute_statistics(write_folder(tmp_path / "a", pixels), ColourFeatures(), batch_size=3, progress=False)
    two = compute_statistics(write_folder(tmp_path / "b", pixels[::-1]), ColourFeatures(), batch_size=4, progress=False)
    features = ColourFeatures()(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert_close(one, features)
    assert_close(two, features)


# ---- the whole measurement -------------------------------------------------------------------------------------------


def test_fid_of_a_set_with_itself_is_zero(tmp_path: Path, colours: ColourFeatures) -> None:
    folder = write_folder(tmp_path / "set", make_pixels(9))
    assert 0 <= measure_fid(folder, folder, progress=False).fid < 1e-9


def test_fid_by_hand(tmp_path: Path, colours: ColourFeatures) -> None:
    pixels = make_pixels(30) // 2
    samples, reference = write_folder(tmp_path / "s", pixels + 50), write_folder(tmp_path / "r", pixels)
    result = measure_fid(samples, reference, output=tmp_path / "fid.json", batch_size=7, progress=False)
    assert result.fid == pytest.approx(12 * 50**2, rel=1e-12)  # all 12 features shifted by 50
    assert str(result) == (f"FID-30  30000.00  (features colours, samples {samples}, reference {reference}: 30 images)")
    (warning,) = result.warnings
    assert "FID-30" in warning
    written = json.loads((tmp_path / "fid.json").read_text())
    assert written.pop("warnings") == [warning]
    assert written == {
        "metric": "fid", "fid": result.fid, "num_samples": 30, "num_reference": 30, "features": "colours",
        "samples": str(samples), "reference": str(reference),
    }  # fmt: skip


def test_reader_is_warned(tmp_path: Path, colours: ColourFeatures) -> None:
    colours.published = False
    folder = write_folder(tmp_path / "s", make_pixels(4))
    Image.open(folder / "0000.png").save(folder / "0000.jpeg")
    (folder / "0000.png").unlink()
    warnings = " | ".join(measure_fid(folder, write_folder(tmp_path / "r", make_pixels(4, size=16))).warnings)
    for expected in [
        "FID-4 compares",
        "1 of the 4 samples are JPEG",
        "8 x 8 px and the reference 16 x 16",
        "not the publ",
    ]:
        assert expected in warnings
    backwards = " | ".join(measure_fid(tmp_path / "r", folder).warnings)
    assert "JPEG" not in backwards  # references may be what they are


def test_stored_statistics_replace_the_images_of_a_reference(tmp_path: Path, colours: ColourFeatures) -> None:
    """ADM's reference files hold 10,000 images for precision and recall only; FID is against their mu and sigma."""
    features = colours(torch.from_numpy(make_pixels(20, seed=1)).permute(0, 3, 1, 2)).numpy()
    np.savez(
        tmp_path / "r.npz",
        arr_0=make_pixels(5, seed=2), mu=features.mean(axis=0).astype(np.float32), sigma=np.cov(features, rowvar=False),
    )  # fmt: skip
    samples = write_folder(tmp_path / "s", make_pixels(20, seed=1))
    result = measure_fid(samples, tmp_path / "r.npz", progress=False)
    assert result.fid < 1e-6 and result.num_reference is None
    assert str(result).endswith("r.npz: stored statistics)")
    by_images = measure_fid(samples, tmp_path / "r.npz", features="emov2:x", progress=False)
    assert by_images.fid > 1 and by_images.num_reference == 5


def test_equal_features_are_pointed_out(tmp_path: Path, colours: ColourFeatures) -> None:
    """An untrained network may give one and the same vector for all images: distance 0 for any two sets."""
    varied = write_folder(tmp_path / "varied", make_pixels(4))
    equal = write_folder(tmp_path / "equal", make_pixels(1).repeat(4, axis=0))
    assert "all 4 samples have the same features" in measure_fid(equal, varied, progress=False).warnings[-1]
    assert "same features" not in str(measure_fid(varied, varied, progress=False).warnings)
    with pytest.raises(InputError, match="the reference .*equal have the same features"):
        measure_fid(varied, equal, progress=False)


def test_num_images_takes_samples_only(tmp_path: Path, colours: ColourFeatures) -> None:
    samples, reference = write_folder(tmp_path / "s", make_pixels(9)), write_folder(tmp_path / "r", make_pixels(6))
    result = measure_fid(samples, reference, num_images=7, progress=False)
    assert (result.num_samples, result.num_reference) == (7, 6)


# ---- classifier features ---------------------------------------------------------------------------------------------


class BrightestChannel(torch.nn.Module):
    """A classifier of three classes: which of red, green and blue is brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = torch.nn.Parameter(2 * torch.eye(3))
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.scale * x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        pooled = x.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


@pytest.fixture
def classifier(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    snapshot = SimpleNamespace(
        path=Path("snap"), model=BrightestChannel().eval(), class_names=["red", "green", "blue"], image_size=4
    )
    monkeypatch.setitem(sys.modules, "d_emo.checkpoint", SimpleNamespace(load_classifier=lambda path: snapshot))
    return snapshot


def flat_colours(*colours: tuple[int, int, int], size: int = 8) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, size, size)


def test_classifier_sees_its_own_size_and_range(classifier: SimpleNamespace) -> None:
    extractor = create_extractor("emov2:snap")
    features = extractor(flat_colours((0, 255, 51)))
    assert extractor.dim == 3 and features.shape == (1, 3) and not features.requires_grad
    torch.testing.assert_close(features, torch.tensor([[-1.0, 1.0, -0.6]]))
    assert classifier.model.seen[-1].shape == (1, 3, 4, 4)


def test_classifier_resizing_is_antialiased(classifier: SimpleNamespace) -> None:
    stripes = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    stripes[..., 3::8] = stripes[..., 4::8] = 255  # where plain bilinear sampling to an eighth looks: all 1
    ClassifierFeatures("snap")(stripes)
    assert classifier.model.seen[-1].max() < 0


def test_name_tells_weights_apart(classifier: SimpleNamespace) -> None:
    before = ClassifierFeatures("snap").name
    assert before == ClassifierFeatures("snap").name and before.startswith("emov2:snap@")
    with torch.no_grad():
        classifier.model.head.weight[0, 0] += 1e-3
    assert ClassifierFeatures("snap").name != before


def test_class_accuracy(classifier: SimpleNamespace) -> None:
    images = flat_colours((200, 10, 10), (10, 200, 10), (10, 10, 200), (10, 10, 200))
    labels = [0, 1, 2, 1]
    assert class_accuracy(classifier, images, labels) == 0.75
    assert class_accuracy(classifier, images, torch.tensor(labels), batch_size=3) == 0.75
    assert class_accuracy(classifier, iter(images.split(1)), labels) == 0.75


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1], "more images than the 2 labels"),
        ([0, 1, 2, 1, 0], "4 images came with 5"),
        ([0, 1, 2, 3], "labels 0 to 3"),
    ],
)
def test_class_accuracy_refuses(classifier: SimpleNamespace, labels: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        class_accuracy(classifier, flat_colours(*[(1, 2, 3)] * 4), labels)


# ---- Inception -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights file of a random Inception, He-initialised: with torch's own initialisation the features vanish."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            pass

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Unloaded("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "empty.pth"))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def test_inception_fid_equals_torch_fidelity(tmp_path: Path, random_inception: Path) -> None:
    """The sets lie far apart: with fewer images than features, torch-fidelity's trace term is rounded by about 1e-5.

    Ours is not, so that it is also held to the features themselves, whose singular values give the term exactly.
    """
    import torch_fidelity

    first = write_folder(tmp_path / "a" / "class", make_pixels(5, size=32, cell=8)).parent
    second = write_folder(tmp_path / "b" / "class", make_pixels(6, size=32, cell=2, seed=1)).parent
    result = measure_fid(first, second, inception_weights=random_inception, batch_size=5, device="cpu", progress=False)
    peer = torch_fidelity.calculate_metrics(
        input1=str(first), input2=str(second), samples_find_deep=True, fid=True, cuda=False, cache=False, verbose=False,
        save_cpu_ram=True, batch_size=6, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(random_inception),
    )["frechet_inception_distance"]  # fmt: skip
    assert result.fid == pytest.approx(peer, rel=1e-6) and peer > 1
    assert result.features.startswith("inception-v3-compat@")
    assert "not the published Inception weights" in result.warnings[-1]


def test_inception_distance_is_exact_for_few_images(random_inception: Path) -> None:
    extractor = InceptionFeatures(random_inception)
    pixels = [torch.from_numpy(make_pixels(3, size=16, cell=2, seed=seed)).permute(0, 3, 1, 2) for seed in (0, 1)]
    features = [extractor(each)[:, ::8].double() for each in pixels]  # 256 dimensions: seconds less
    centred = [(each - each.mean(dim=0)) / 2**0.5 for each in features]
    expected = (
        (features[0].mean(dim=0) - features[1].mean(dim=0)).square().sum()
        + centred[0].square().sum() + centred[1].square().sum()
        - 2 * torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    )  # fmt: skip
    first, second = (gather(each) for each in features)
    measured = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert measured == pytest.approx(float(expected), rel=1e-9)


def test_missing_inception_weights_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    def fail(url: str, dst: str, hash_prefix: str) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError) as raised:
        create_extractor("inception")
    sentence = str(raised.value)
    for expected in [URL_INCEPTION_V3, URL_INCEPTION_V3.split("/")[-1], str(tmp_path / "hub"), "no network"]:
        assert expected in sentence
    assert "--inception-weights FILE" in sentence and "--features emov2:SNAPSHOT" in sentence


def test_inception_weights_are_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d_emo.evaluation.features import locate_inception_weights

    downloads = []

    def download(url: str, dst: str, hash_prefix: str) -> None:
        downloads.append((url.split("/")[-1], hash_prefix))
        Path(dst).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    first, second = locate_inception_weights(), locate_inception_weights()
    assert first == second == tmp_path / "hub" / "checkpoints" / first.name and first.is_file()
    assert downloads == [(first.name, first.stem.split("-")[-1])]


class Bomb:
    """Unpickling this would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_inception_weights_that_are_none(tmp_path: Path) -> None:
    bad, struck = tmp_path / "bad.pth", tmp_path / "struck"
    with pytest.raises(InputError, match="bad.pth do not exist"):
        InceptionFeatures(bad)
    bad.write_bytes(b"no weights")
    with pytest.raises(InputError, match="bad.pth is not an intact weights file"):
        InceptionFeatures(bad)
    torch.save({"fc.weight": torch.zeros(1)}, bad)
    with pytest.raises(InputError, match="bad.pth does not hold the weights of torch-fidelity's Inception"):
        InceptionFeatures(bad)
    torch.save([1, 2], bad)
    with pytest.raises(InputError, match="bad.pth does not hold the weights"):
        InceptionFeatures(bad)
    torch.save({"fc.weight": Bomb(struck)}, bad)
    with pytest.raises(InputError, match="bad.pth is not an intact weights file"):
        InceptionFeatures(bad)
    assert not struck.exists()
    torch.load(bad, weights_only=False)
    assert struck.exists()  # the bomb works: it was not loaded


def test_cut_weights_file(tmp_path: Path, random_inception: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(random_inception.read_bytes()[:1_000_000])
    with pytest.raises(InputError, match="cut.pth is not an intact weights file"):
        InceptionFeatures(tmp_path / "cut.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(InputError, match="old.pth"):
        InceptionFeatures(tmp_path / "old.pth")
