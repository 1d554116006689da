"""Measuring images: feature extractors, streaming statistics, FID and its relatives, metrics by a classifier.

Reading order: ``statistics`` (numbers only), ``npz`` and ``images`` (where pixels come from), ``features`` (networks),
``metrics`` (what is gathered and what comes out), ``reference`` (the other side), ``feature_shards`` (features of drawn
images, by many processes), ``result`` (the report), ``measurement`` (all of it wired together),
``classifier_metrics`` (a classifier and real images instead of a table), ``drawn`` (images of a snapshot). Metrics and
extractors are rows of ``d_emo.tables``.
"""

from d_emo.evaluation.classifier_metrics import (
    ClassifierMetrics,
    compare_with_real,
    even_labels,
    measure_timed,
    open_real,
    sampler_table,
)
from d_emo.evaluation.drawn import draw_classes, measure_snapshot
from d_emo.evaluation.feature_shards import FeatureShards, Ranks, draw_labels
from d_emo.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    InceptionFeatures,
    create_extractor,
    fingerprint,
)
from d_emo.evaluation.images import FolderImages, ZipImages, open_images
from d_emo.evaluation.measurement import Measurement, check_output, compute_statistics, measure
from d_emo.evaluation.metrics import Gathered, ImageSet, InceptionScore, kernel_distance, precision_recall
from d_emo.evaluation.npz import NpzImages, holds_statistics, read_statistics
from d_emo.evaluation.reference import Reference, write_reference
from d_emo.evaluation.result import Result
from d_emo.evaluation.statistics import FeatureStatistics, StoredStatistics, frechet_distance

__all__ = [
    "ClassifierFeatures", "ClassifierMetrics", "FeatureExtractor", "FeatureShards", "FeatureStatistics",
    "FolderImages", "Gathered", "ImageSet", "InceptionFeatures", "InceptionScore", "Measurement", "NpzImages", "Ranks",
    "Reference", "Result", "StoredStatistics", "ZipImages", "check_output", "compare_with_real", "compute_statistics",
    "create_extractor",
    "draw_classes", "draw_labels", "even_labels", "fingerprint", "frechet_distance", "holds_statistics",
    "kernel_distance", "measure", "measure_snapshot", "measure_timed", "open_images", "open_real", "precision_recall",
    "read_statistics", "sampler_table", "write_reference",
]  # fmt: skip
