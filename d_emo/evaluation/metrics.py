"""What is summed or stored of a set of images, and the computation of the rows of ``d_emo.tables.METRICS``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo.errors import InputError
from d_emo.evaluation.features import FeatureExtractor
from d_emo.evaluation.statistics import FeatureStatistics, StoredStatistics, frechet_distance
from d_emo.tables import METRICS

SPLITS, SPLIT_SEED = 10, 2020  # of the Inception Score: torch-fidelity's
NEIGHBOURS = 3  # whose distance is the radius around an image in precision and recall: ADM's and torch-fidelity's
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID: torch-fidelity's
DISTANCES_AT_ONCE = 1 << 24  # in precision and recall: 64 MiB, whatever the number of images


class InceptionScore:
    """exp of the mean divergence of an image's classes from the set's (Salimans et al. 2016), by sums alone.

    The images fall into torch-fidelity's ten random splits, whose scores are averaged; of a split, the sum of its class
    distributions and of their negative entropies is all that is needed. ``count`` images will come.
    """

    def __init__(self, count: int):
        assert count >= SPLITS
        order = np.random.RandomState(SPLIT_SEED).permutation(count)
        self._split = torch.empty(count, dtype=torch.long)
        for split in range(SPLITS):
            self._split[order[split * count // SPLITS : (split + 1) * count // SPLITS]] = split
        self._seen = 0
        self._classes: torch.Tensor | None = None  # (SPLITS, classes): sums of distributions
        self._negative_entropy = torch.zeros(SPLITS, dtype=torch.float64)

    def update(self, logits: torch.Tensor) -> None:
        """Add a batch of images, in order. Shape: (B, classes)."""
        logits = logits.detach().cpu().double()
        split = self._split[self._seen : self._seen + len(logits)]
        self._seen += len(logits)
        share, log_share = logits.softmax(dim=1), logits.log_softmax(dim=1)
        if self._classes is None:
            self._classes = torch.zeros(SPLITS, logits.shape[1], dtype=torch.float64)
        self._classes.index_add_(0, split, share)
        self._negative_entropy.index_add_(0, split, (share * log_share).sum(dim=1))

    def result(self) -> dict[str, float]:
        """Mean and standard deviation over the splits."""
        assert self._seen == len(self._split)
        counts = self._split.bincount(minlength=SPLITS)
        mean = self._classes / counts[:, None]
        scores = (self._negative_entropy / counts - torch.xlogy(mean, mean).sum(dim=1)).exp()
        return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std(correction=0))}


class FeatureRows:
    """Feature vectors of the images whose numbers are ``kept``, in memory, or mapped into it from a file of float32."""

    def __init__(self, dim: int, kept: Sequence[int], path: Path | None = None):
        self._kept, self._seen = np.asarray(kept), 0
        shape = (len(kept), dim)
        self._rows = np.empty(shape, np.float32) if path is None else np.memmap(path, np.float32, "w+", shape=shape)

    def update(self, features: torch.Tensor) -> None:
        """Add a batch of images, in order. Shape: (B, dim)."""
        first, last = np.searchsorted(self._kept, [self._seen, self._seen + len(features)])
        self._rows[first:last] = features.cpu().float().numpy()[self._kept[first:last] - self._seen]
        self._seen += len(features)

    def tensor(self) -> torch.Tensor:
        """All rows; those of a file are on disk until they are read. Shape: (images, dim) float32."""
        return torch.from_numpy(self._rows)


class Gathered:
    """What metrics need of one set of images. Only the rows grow with the set; in a folder, they are on disk.

    Metrics compare it with another, or with a `Reference`, which has the same attributes but for ``score``.

    Args:
        extractor: Whose features will come.
        needs: Of ``pooled``, ``spatial`` (statistics), ``score`` and ``rows``; attributes that are not needed are None.
        count: How many images will come.
        folder: Where rows go; memory by default.
        kept: Which images' rows are stored; all by default.
    """

    def __init__(
        self, extractor: FeatureExtractor, needs: Collection[str], count: int, *, folder: Path | None = None,
        kept: Sequence[int] | None = None,
    ):  # fmt: skip
        self._extractor = extractor
        self.pooled = FeatureStatistics(extractor.dim) if "pooled" in needs else None
        self.spatial = FeatureStatistics(extractor.spatial_dim) if "spatial" in needs else None
        self.score = InceptionScore(count) if "score" in needs else None
        file = folder and folder / "rows.f32"
        self._rows = FeatureRows(extractor.dim, kept or range(count), file) if "rows" in needs else None

    @property
    def rows(self) -> torch.Tensor | None:
        """Feature vectors of single images, or None. Shape: (N, dim) float32."""
        return self._rows and self._rows.tensor()

    def update(self, features: dict[str, torch.Tensor]) -> None:
        """Add a batch: what ``extractor.extract`` returned.

        Raises:
            InputError: A feature is NaN or infinite.
        """
        pooled = features["pooled"]
        if self.pooled is not None:
            self.pooled.update(pooled)
        if self.spatial is not None:
            self.spatial.update(features["spatial"])
        if self.score is not None:
            self.score.update(self._extractor.logits(pooled))
        if self._rows is not None:
            self._rows.update(pooled)

    def update_all(self, batches: Iterable[dict[str, torch.Tensor]]) -> Gathered:
        """Add all batches; return itself."""
        for batch in batches:
            self.update(batch)
        return self


def check_count(metrics: Collection[str], count: int) -> None:
    """Refuse a set, of samples or of a reference, that is too small for a metric.

    Raises:
        InputError: Says which metric, and how many images it needs.
    """
    for row in map(METRICS.__getitem__, metrics):
        if count < row.least:
            raise InputError(f"{count} images are too few for {row.title} ({row.name}); it needs at least {row.least}")


def fid(samples: Gathered, reference: Any, device: torch.device | str) -> dict[str, float]:
    """Frechet Inception Distance (Heusel et al. 2017)."""
    return {"fid": _distance(samples.pooled, reference.pooled)}


def sfid(samples: Gathered, reference: Any, device: torch.device | str) -> dict[str, float]:
    """The same over spatial features (Nash et al. 2021)."""
    return {"sfid": _distance(samples.spatial, reference.spatial)}


def isc(samples: Gathered, reference: None, device: torch.device | str) -> dict[str, float]:
    """Inception Score."""
    return samples.score.result()


def prc(samples: Gathered, reference: Any, device: torch.device | str) -> dict[str, float]:
    """Precision and recall."""
    return precision_recall(samples.rows.to(device), reference.rows.to(device))


def kid(samples: Gathered, reference: Any, device: torch.device | str) -> dict[str, float]:
    """Kernel Inception Distance."""
    return kernel_distance(samples.rows, reference.rows)


def _distance(ours: FeatureStatistics | StoredStatistics, theirs: FeatureStatistics | StoredStatistics) -> float:
    return frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)


def precision_recall(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Shares of samples near the reference and of the reference near samples (Kynkaanniemi et al. 2019).

    Near means within the distance of some image of the other set to its third neighbour there.

    Shape: (N, dim), (M, dim) float32.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    at_once = max(DISTANCES_AT_ONCE // max(len(samples), len(reference)), 1)
    values = prc_features_to_metric(
        samples, reference, prc_neighborhood=NEIGHBOURS, prc_batch_size=at_once, save_cpu_ram=True, verbose=False
    )
    return {"precision": values[KEY_METRIC_PRECISION], "recall": values[KEY_METRIC_RECALL]}


def kernel_distance(samples: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """KID (Binkowski et al. 2018): mean and deviation over random subsets of 1000, or of all if there are fewer.

    Shape: (N, dim), (M, dim) float32.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET_SIZE, len(samples), len(reference))
    values = kid_features_to_metric(samples, reference, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False)
    return {"kid": values[KEY_METRIC_KID_MEAN], "kid_std": values[KEY_METRIC_KID_STD], "kid_subset_size": size}
