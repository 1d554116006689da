"""Steps that go through a map element by element: activations with their derivatives, and a residual's sum."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d_emo.kernels.dispatch import Form, opaque, run

Activation = Literal["gelu", "silu", "none"]


def activation_of(act: nn.Module | None) -> Activation | None:
    """The activation that an operator may apply in place of a module; None where the module has to be called."""
    if act is None:
        return "none"
    if opaque(act) is not None:
        return None
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else None
    return "silu" if type(act) is nn.SiLU else "none" if type(act) is nn.Identity else None


def activate(z: Tensor, act: Activation) -> Tensor:
    """``act(z)``; "gelu" is the exact one. Shape: any -> same."""
    return z if act == "none" else F.gelu(z) if act == "gelu" else F.silu(z)


def activate_backward(grad: Tensor, z: Tensor, act: Activation) -> Tensor:
    """``grad`` times the derivative of the activation at ``z``. Shape: any, twice -> same."""
    if act == "none":
        return grad
    return torch.ops.aten.gelu_backward(grad, z) if act == "gelu" else torch.ops.aten.silu_backward(grad, z)


def add(fresh: Tensor, other: Tensor, *makers: nn.Module) -> Tensor:
    """``fresh + other``; in inference in the memory of ``fresh``, which the caller must not use again.

    Args:
        fresh: what the caller made.
        other: what it is added to.
        makers: the modules that returned ``fresh``; what hangs on one may keep it, and another class may own it.

    Shape: any, twice the same -> same.
    """
    return run("add", ADD, fresh, other, *makers)


def _in_place_refuses(fresh: Tensor, other: Tensor, *makers: nn.Module) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.compiler.is_compiling():
        return "the compiler joins small steps itself"
    if fresh.dtype != other.dtype or fresh is other:
        return "the sum does not fit into the first map"
    return opaque(*makers)


ADD = (
    Form("in place", lambda fresh, other, *makers: fresh.add_(other), _in_place_refuses),
    Form("a new map", lambda fresh, other, *makers: fresh + other),
)
