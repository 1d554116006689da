"""Measuring images: feature extractors, streaming statistics, the Frechet distance and class accuracy.

Reading order: ``statistics`` (numbers only), ``npz`` and ``images`` (where pixels come from), ``features`` (networks),
``fid`` (all of it wired together). Knows no denoiser: it measures folders, ``.npz`` files and batches of bytes.
"""

from d_emo.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    InceptionFeatures,
    class_accuracy,
    create_extractor,
)
from d_emo.evaluation.fid import FidResult, compute_statistics, measure_fid
from d_emo.evaluation.images import FolderImages, IterableImages, open_images
from d_emo.evaluation.npz import NpzImages, holds_statistics, read_statistics
from d_emo.evaluation.statistics import FeatureStatistics, StoredStatistics, frechet_distance

__all__ = [
    "ClassifierFeatures",
    "FeatureExtractor",
    "FeatureStatistics",
    "FidResult",
    "FolderImages",
    "InceptionFeatures",
    "IterableImages",
    "NpzImages",
    "StoredStatistics",
    "class_accuracy",
    "compute_statistics",
    "create_extractor",
    "frechet_distance",
    "holds_statistics",
    "measure_fid",
    "open_images",
    "read_statistics",
]
