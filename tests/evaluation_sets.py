"""Small image sets and quick features for the tests of the evaluation room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from d_emo.evaluation import FeatureStatistics, open_images

CLASSES = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)) / 200


class ColourFeatures:
    """Stands in for a network: means of 2 x 2 patches, linear in the pixels, so that the sums are easy to repeat."""

    name, dim, spatial_dim, published = "colours", 12, 4, True

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(images.double(), 2).flatten(1)

    def extract(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooled": self(images), "spatial": images[:, 0, :2, :2].double().flatten(1)}

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        return pooled.float() @ CLASSES


class RegisteredColours(FeatureExtractorBase):
    """ColourFeatures as torch-fidelity wants them."""

    def __init__(self, name: str, features_list: list[str], **kwargs: object):
        super().__init__(name, features_list)
        self._colours = ColourFeatures()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooled = self._colours(images).float()
        features = {"pooled": pooled, "logits": self._colours.logits(pooled)}
        return tuple(features[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def make_pixels(count: int, *, seed: int = 0, size: int = 8, cell: int = 1) -> np.ndarray:
    """Random squares of ``cell`` px. Shape: (count, size, size, 3) uint8."""
    shape = (count, size // cell, size // cell, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return coarse.repeat(cell, axis=1).repeat(cell, axis=2)


def as_batch(pixels: np.ndarray) -> torch.Tensor:
    """Shape: (N, H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, each in enumerate(pixels):
        Image.fromarray(each).save(folder / f"{index:04d}.png")
    return folder


def read_all(source: object, **options: int) -> torch.Tensor:
    return torch.cat(list(open_images(source, **options).batches(3)))


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
