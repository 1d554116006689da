"""Mean and covariance of features, gathered batch by batch in float64, and the Frechet distance between two of them."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from d_emo.errors import InputError

# An eigenvalue this far below zero, relative to the largest, is no rounding: float32 statistics reach about -1e-6.
NEGATIVE_EIGENVALUE_TOLERANCE = 1e-4
CONSTANT_SPREAD = 1e-12  # variance over squared mean that float32 features of one and the same image can reach


class StoredStatistics(NamedTuple):
    """Mean (dim,) and covariance (dim, dim) in float64, read from a file; of how many images, if that says so."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int | None = None


class FeatureStatistics:
    """Mean and covariance of a stream of feature vectors; memory is (dim + 1) * dim numbers whatever the stream.

    The pairwise update of Chan, Golub and LeVeque (1979) sums squares about the running mean, so that no digits cancel
    as they do in E[xx'] - E[x]E[x]'.

    Attributes:
        dim: Length of a feature vector.
        count: Feature vectors seen so far.
    """

    def __init__(self, dim: int):
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)'

    def update(self, features: torch.Tensor) -> None:
        """Add a batch of feature vectors. The sums stay on the device of the features, if that knows float64.

        Shape: (B, dim), any floating type.

        Raises:
            InputError: A feature is NaN or infinite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of shape {tuple(features.shape)} do not fit statistics of (B, {self.dim})")
        if not torch.isfinite(features).all():
            raise InputError(
                f"the features of images {self.count + 1} to {self.count + len(features)} hold NaN or infinite values; "
                "the weights of the feature network are damaged"
            )
        if features.device.type == "mps":  # has no float64
            features = features.cpu()
        features = features.detach().double()
        self._mean, self._scatter = self._mean.to(features.device), self._scatter.to(features.device)
        count = len(features)
        if count == 0:
            return
        batch_mean, total = features.mean(dim=0), self.count + count
        delta = batch_mean - self._mean
        shift = delta * (self.count * count / total) ** 0.5  # whose square the scatter gains as the mean moves
        self._mean += delta * (count / total)
        self.count = total
        rows = torch.cat([features - batch_mean, shift[None]])
        self._scatter.addmm_(rows.T, rows)

    @property
    def mean(self) -> torch.Tensor:
        """Mean feature vector, on the CPU. Shape: (dim,) float64."""
        self._require(1)
        return self._mean.cpu().clone()

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (divided by count - 1, as in ADM's evaluator), on the CPU. Shape: (dim, dim) float64."""
        self._require(2)
        return self._scatter.cpu() / (self.count - 1)

    def _require(self, needed: int) -> None:
        if self.count < needed:
            raise InputError(f"statistics over {self.count} images were asked for; at least {needed} are needed")


def is_constant(statistics: FeatureStatistics | StoredStatistics) -> bool:
    """Whether the features vary by no more than float32 rounding."""
    return bool(statistics.covariance.trace().abs() <= CONSTANT_SPREAD * statistics.mean.square().sum())


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared Frechet (2-Wasserstein) distance between two Gaussians.

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^1/2)        (Dowson and Landau 1982, Heusel 2017)

    With factors sigma = L L', the last trace is the sum of the singular values of L1' L2. That takes no square root
    of a rounded zero: in eigenvalues of sigma1 sigma2, zeros come out near +-1e-16 of the largest, and thousands of
    their roots, 1e-8 each, add up for singular covariances, that is for fewer images than features.

    Shape: means (dim,), covariances (dim, dim), singular or not.

    Raises:
        InputError: The dimensions differ, a value is not finite, or a sigma has a clearly negative eigenvalue.
    """
    first, second = _as_moments(mu1, sigma1), _as_moments(mu2, sigma2)
    if first[0].shape != second[0].shape:
        raise InputError(
            f"statistics over {len(first[0])} and over {len(second[0])} features cannot be compared; "
            "measure both sides with the same features"
        )
    difference = first[0] - second[0]
    overlap = np.linalg.svd(_factor(first[1]).T @ _factor(second[1]), compute_uv=False).sum()
    distance = difference @ difference + np.trace(first[1]) + np.trace(second[1]) - 2 * overlap
    return max(float(distance), 0.0)  # equal Gaussians land within rounding on either side of 0


def _as_moments(mu: ArrayLike, sigma: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    mu = np.atleast_1d(np.asarray(mu, dtype=np.float64))
    sigma = np.atleast_2d(np.asarray(sigma, dtype=np.float64))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"a mean of shape {mu.shape} and a covariance of shape {sigma.shape} do not belong together")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError("the statistics hold NaN or infinite values")
    return mu, sigma


def _factor(sigma: np.ndarray) -> np.ndarray:
    """L with L L' = sigma; columns that are rounding would only cost time. Shape: (dim, dim) -> (dim, rank)."""
    eigenvalues, eigenvectors = np.linalg.eigh((sigma + sigma.T) / 2)
    largest = np.abs(eigenvalues).max()
    if eigenvalues[0] < -NEGATIVE_EIGENVALUE_TOLERANCE * largest:
        raise InputError(f"a covariance with the negative eigenvalue {eigenvalues[0]:.3g} is none; its file is damaged")
    kept = eigenvalues > largest * len(sigma) * np.finfo(np.float64).eps
    return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])
