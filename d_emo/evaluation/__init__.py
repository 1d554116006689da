"""Measuring images: feature extractors, streaming statistics, FID and its relatives, metrics by a classifier.

Reading order: ``statistics`` (numbers only), ``npz`` and ``images`` (where pixels come from), ``features`` (networks),
``metrics`` (what is gathered and what comes out), ``reference`` (the other side), ``feature_shards`` (features of drawn
images, by many processes), ``result`` (the report), ``measurement`` (all of it wired together),
``classifier_metrics`` (a classifier and real images instead of a table), ``drawn`` (images of a snapshot). Metrics and
extractors are rows of ``d_emo.tables``.
"""

from importlib import import_module
from typing import Any

from d_emo.evaluation.classifier_metrics import (
    ClassifierMetrics,
    compare_with_real,
    even_labels,
    measure_timed,
    open_real,
    sampler_table,
    words_of_parts,
)
from d_emo.evaluation.feature_shards import Ranks, draw_labels
from d_emo.evaluation.features import ClassifierFeatures, FeatureExtractor, InceptionFeatures, create_extractor
from d_emo.evaluation.images import open_images
from d_emo.evaluation.measurement import Measurement, check_output, measure
from d_emo.evaluation.metrics import InceptionScore, kernel_distance, precision_recall
from d_emo.evaluation.reference import write_reference
from d_emo.evaluation.result import Result
from d_emo.evaluation.statistics import FeatureStatistics, frechet_distance


def __getattr__(name: str) -> Any:
    if name not in ("draw_classes", "measure_snapshot"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("d_emo.evaluation.drawn"), name)  # diffusers, which stored images can do without
