"""Statistics against closed forms and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_sets import assert_close, gather, make_features

from d_emo.errors import InputError
from d_emo.evaluation import FeatureStatistics, frechet_distance

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


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_streamed_statistics_equal_one_shot(batch_size: int) -> None:
    features = make_features()
    assert_close(gather(*features.split(batch_size)), features)


def test_an_empty_batch_changes_nothing() -> None:
    features = make_features()
    assert_close(gather(torch.ones(0, 7), features, torch.ones(0, 7)), features)


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


