"""Measuring images: feature extractors, streaming statistics, FID and its relatives, class accuracy.

Reading order: ``statistics`` (numbers only), ``npz`` and ``images`` (where pixels come from), ``features`` (networks),
``metrics`` (what is gathered and what comes out), ``reference`` (the other side), ``parts`` (images drawn on the spot,
by many processes), ``result`` (the report), ``measurement`` (all of it wired together), ``judging`` (a classifier
instead of a table). Knows no denoiser: it measures folders, zips, ``.npz`` files and batches of bytes.
"""

from d_emo.evaluation.classifier_metrics import Judge, judge_drawings, judge_sampler, open_real, sampler_table
from d_emo.evaluation.feature_shards import FeatureShards, Ranks, draw_labels
from d_emo.evaluation.features import (
    ClassifierFeatures,
    FeatureExtractor,
    InceptionFeatures,
    class_accuracy,
    create_extractor,
    fingerprint,
)
from d_emo.evaluation.images import FolderImages, IterableImages, ZipImages, open_images
from d_emo.evaluation.measurement import Measurement, check_output, compute_statistics, measure
from d_emo.evaluation.metrics import InceptionScore, kernel_distance, precision_recall
from d_emo.evaluation.npz import NpzImages, holds_statistics, read_statistics
from d_emo.evaluation.reference import Reference, write_reference
from d_emo.evaluation.result import Result
from d_emo.evaluation.statistics import FeatureStatistics, StoredStatistics, frechet_distance

__all__ = [
    "ClassifierFeatures", "FeatureExtractor", "FeatureStatistics", "FolderImages", "InceptionFeatures",
    "InceptionScore", "IterableImages", "Judge", "Measurement", "NpzImages", "FeatureShards", "Ranks", "Reference",
    "Result",
    "StoredStatistics", "ZipImages", "check_output", "class_accuracy", "compute_statistics", "create_extractor",
    "draw_labels", "fingerprint", "frechet_distance", "holds_statistics", "judge_drawings", "judge_sampler",
    "kernel_distance", "measure", "open_images", "open_real", "precision_recall", "read_statistics", "sampler_table",
    "write_reference",
]  # fmt: skip
