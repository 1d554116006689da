"""Everything that comes in kinds, a row each. ``TABLE.register(row)`` adds one, from any package. Free of torch.

Nobody else lists the kinds: settings, help, training, sampling, measuring and reports ask the tables.
"""

from d_emo.tables.datasets import DATASETS, DatasetRow
from d_emo.tables.metrics import METRICS, MetricRow, MetricValue, parse_metrics
from d_emo.tables.models import BLOCKS, FAMILIES, FRAMES, SIZES, BlockRow, FamilyRow, FrameRow, denoisers, family_of
from d_emo.tables.networks import CODECS, EXTRACTORS, CodecRow, ExtractorRow
from d_emo.tables.objectives import (
    OBJECTIVES,
    SCHEDULERS,
    ObjectiveRow,
    SchedulerRow,
    objective_of,
    schedulers_of,
)
from d_emo.tables.table import Reference, Table, load

__all__ = [
    "BLOCKS", "CODECS", "DATASETS", "EXTRACTORS", "FAMILIES", "FRAMES", "METRICS", "OBJECTIVES", "SCHEDULERS", "SIZES",
    "BlockRow", "CodecRow", "DatasetRow", "ExtractorRow", "FamilyRow", "FrameRow", "MetricRow", "MetricValue",
    "ObjectiveRow", "Reference", "SchedulerRow", "Table", "denoisers", "family_of", "load", "objective_of",
    "parse_metrics", "schedulers_of",
]  # fmt: skip
