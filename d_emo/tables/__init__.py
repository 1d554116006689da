"""Everything that comes in kinds, a row each. ``TABLE.register(row)`` adds one, from any package. Free of torch.

Nobody else lists the kinds: settings, help, training, sampling, measuring and reports ask the tables.
"""

from d_emo.tables.datasets import DATASETS, LABEL_BASE, DatasetRow
from d_emo.tables.demos import DEMOS, DemoRow
from d_emo.tables.metrics import (
    CLASS_ACCURACY,
    EMPTY,
    METRICS,
    MetricRow,
    MetricValue,
    check_compared,
    class_values,
    metric_values,
    parse_metrics,
    with_present_names,
)
from d_emo.tables.models import BLOCKS, FAMILIES, FRAMES, SIZES, BlockRow, FamilyRow, FrameRow, denoisers, family_of
from d_emo.tables.networks import (
    ALIGNMENTS,
    AUTOENCODERS,
    CODECS,
    EXTRACTORS,
    AlignmentRow,
    AutoencoderRow,
    CodecRow,
    ExtractorRow,
    parse_alignment,
    parse_features,
)
from d_emo.tables.objectives import (
    OBJECTIVES,
    SCHEDULERS,
    ObjectiveRow,
    SchedulerRow,
    check_start,
    going_on_from,
    noise_objectives,
    objective_of,
    schedulers_of,
    takers,
)
from d_emo.tables.optimizers import OPTIMIZERS, OptimizerRow
from d_emo.tables.scenes import SCENES, SceneRow
from d_emo.tables.systems import SYSTEMS, SystemRow, system_of, systems
from d_emo.tables.table import Reference, SomeRows, Table, load
