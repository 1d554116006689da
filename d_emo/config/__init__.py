"""Typed run settings, from a YAML file and from flags that override it. The only home of defaults; free of torch."""

from d_emo.config.base import (
    ReadingSettings,
    Settings,
    check_paths,
    check_values,
    in_flags,
    parse_settings,
    run_cli,
    setting,
    type_hints,
    write_yaml,
)
from d_emo.config.benchmarking import (
    BENCHMARKS,
    BenchmarkSettings,
    ClassifierBenchmarkSettings,
    DenoiserBenchmarkSettings,
    DenseBenchmarkSettings,
    FormsSettings,
    KernelsSettings,
    StepSettings,
)
from d_emo.config.demos import DemoSettings
from d_emo.config.detecting import DetectorSettings, DetectSettings
from d_emo.config.distilling import DistillSettings
from d_emo.config.encoding import EncodeSettings, VAESettings
from d_emo.config.exporting import ConvertSettings, ExportSettings
from d_emo.config.inspecting import DoctorSettings
from d_emo.config.measuring import (
    PUBLISHED_COUNT,
    EvaluateClassifierSettings,
    ExplainSettings,
    FidSettings,
    JudgeSettings,
    ModelsSettings,
    PlotSettings,
    ReferenceSettings,
)
from d_emo.config.paths import folder_of, is_folder
from d_emo.config.sampling import (
    DEFAULT_GUIDANCE,
    DEFAULT_GUIDE_WEIGHT,
    DEFAULT_STEPS,
    TABLE_STEPS,
    AppSettings,
    SampleSettings,
    check_guidance,
    read_sampler,
)
from d_emo.config.segmenting import Blend, SegmenterSettings, SegmentSettings
from d_emo.config.study import StudySettings
from d_emo.config.training import (
    ClassifierSettings,
    DataSettings,
    HeldOutSettings,
    RunSettings,
    TrainSettings,
)
from d_emo.config.video import VideoSettings
