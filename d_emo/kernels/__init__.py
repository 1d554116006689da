"""Fast forms of the steps that take the time: one function each, chosen by device, equal to the plain form.

What is fast where was measured; see ``sample_outputs/benchmarks/PERFORMANCE.md``.
"""

from d_emo.kernels.activation import Activation
from d_emo.kernels.attention import Partition, window_attention
from d_emo.kernels.choice import plain
from d_emo.kernels.linear import linear

__all__ = ["Activation", "Partition", "linear", "plain", "window_attention"]
