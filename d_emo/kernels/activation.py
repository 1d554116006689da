"""Steps that go through a map element by element: activations with their derivatives, and a sum."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from d_emo.kernels.dispatch import is_plain

Activation = Literal["gelu", "silu", "none"]


def activate(z: Tensor, act: Activation) -> Tensor:
    """``act(z)``; "gelu" is the exact one. Shape: any -> same."""
    return z if act == "none" else F.gelu(z) if act == "gelu" else F.silu(z)


def activate_backward(grad: Tensor, z: Tensor, act: Activation) -> Tensor:
    """``grad`` times the derivative of the activation at ``z``. Shape: any, twice -> same."""
    if act == "none":
        return grad
    return torch.ops.aten.gelu_backward(grad, z) if act == "gelu" else torch.ops.aten.silu_backward(grad, z)


def add_to(fresh: Tensor, other: Tensor) -> Tensor:
    """``fresh + other``; in inference in the memory of ``fresh``, which the caller must not use again.

    Shape: any, twice the same -> same.
    """
    in_place = not torch.is_grad_enabled() and not is_plain() and fresh.dtype == other.dtype
    return fresh.add_(other) if in_place else fresh + other
