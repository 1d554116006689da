"""The operators of a block. Each has a table of forms, equal to its plain one, of which the first that can runs.

What is fast where was measured; see ``sample_outputs/benchmarks/PERFORMANCE.md``. `explain` says what runs here.
"""

from d_emo.kernels.activation import add
from d_emo.kernels.attention import window_attention
from d_emo.kernels.depthwise import folded, local_conv
from d_emo.kernels.dispatch import asked_fixed, avoidable, fixed, known, opaque, plain, record
from d_emo.kernels.explaining import Explanation, explain
from d_emo.kernels.linear import linear
from d_emo.kernels.local import local_branch
from d_emo.kernels.modulation import modulated_norm
from d_emo.kernels.partitions import PARTITIONS, AttentionMode, FarPartition, NearPartition
from d_emo.kernels.slices import in_slices

__all__ = [
    "PARTITIONS",
    "AttentionMode",
    "Explanation",
    "FarPartition",
    "NearPartition",
    "add",
    "asked_fixed",
    "avoidable",
    "explain",
    "fixed",
    "folded",
    "in_slices",
    "known",
    "linear",
    "local_branch",
    "local_conv",
    "modulated_norm",
    "opaque",
    "plain",
    "record",
    "window_attention",
]
