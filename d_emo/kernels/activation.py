"""The activations of an expanded value and their derivatives."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["gelu", "silu", "none"]


def activate(z: Tensor, act: Activation) -> Tensor:
    """``act(z)``; "gelu" is the exact one. Shape: any -> same."""
    return z if act == "none" else F.gelu(z) if act == "gelu" else F.silu(z)


def activate_backward(grad: Tensor, z: Tensor, act: Activation) -> Tensor:
    """``grad`` times the derivative of the activation at ``z``. Shape: any, twice -> same."""
    if act == "none":
        return grad
    return torch.ops.aten.gelu_backward(grad, z) if act == "gelu" else torch.ops.aten.silu_backward(grad, z)
