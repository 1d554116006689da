"""Fast forms of the steps that take the time: one function each, chosen by device, equal to the plain form.

What is fast where was measured; see ``sample_outputs/benchmarks/PERFORMANCE.md``.
"""

from d_emo.kernels.activation import Activation, add_to
from d_emo.kernels.attention import window_attention
from d_emo.kernels.depthwise import depthwise_conv2d, depthwise_silu, fuses_activation
from d_emo.kernels.dispatch import fuses_inference, plain
from d_emo.kernels.linear import linear
from d_emo.kernels.local import fuses_skip, fuses_training, local_projection, local_skip
from d_emo.kernels.modulation import fuses_modulation, modulated_norm
from d_emo.kernels.partitions import PARTITIONS, AttentionMode, FarPartition, NearPartition, Partition
from d_emo.kernels.slices import in_slices

__all__ = [
    "PARTITIONS",
    "Activation",
    "AttentionMode",
    "FarPartition",
    "NearPartition",
    "Partition",
    "add_to",
    "depthwise_conv2d",
    "depthwise_silu",
    "fuses_activation",
    "fuses_inference",
    "fuses_modulation",
    "fuses_skip",
    "fuses_training",
    "in_slices",
    "linear",
    "local_projection",
    "local_skip",
    "modulated_norm",
    "plain",
    "window_attention",
]
