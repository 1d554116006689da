"""Muon on the matrices of the blocks, AdamW on all else.

Sources: Jordan et al., 2024 (the update, and which parameters it is for); Liu et al., 2025, "Muon is Scalable for LLM
Training" (weight decay, and the scale that lets it share AdamW's learning rate).
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from d_emo import kernels
from d_emo.errors import InputError

COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
"""Of the Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X, as in Jordan et al."""


def muon(model: nn.Module, groups: list[dict[str, Any]], *, lr: float, fused: bool) -> torch.optim.Optimizer:
    """Muon on what the model calls `DenoiserFrame.block_matrices`, AdamW on the other parameters.

    Args:
        model: A denoiser.
        groups: See ``d_emo.tables.OptimizerRow``.
        lr: Of both.
        fused: Unused: fused updates would see the scaled gradients of fp16, which Muon must not.

    Raises:
        InputError: The model names no matrices.
    """
    stacked = model.block_matrices()
    split: list[dict[str, Any]] = []
    for group in groups:
        params, rest = group["params"], {**group, "params": {}}
        of_parts: dict[int, dict[str, nn.Parameter]] = {}
        for name, parameter in params.items():
            kept = of_parts.setdefault(stacked[name], {}) if name in stacked else rest["params"]
            kept[name] = parameter
        split += [rest] * bool(rest["params"])
        split += [{**group, "params": each, "matrices": parts} for parts, each in sorted(of_parts.items())]
    if not any("matrices" in each for each in split):
        raise InputError(f"`optimizer` muon is for the matrices of blocks, and {type(model).__name__} names none")
    return Muon([{**each, "params": [*each["params"].values()]} for each in split], lr=lr)


class Muon(torch.optim.AdamW):
    """Muon for the groups that have ``matrices``, AdamW for the others.

        M <- mu M + (1 - mu) G,   U = mu M + (1 - mu) G                      momentum, as Nesterov
        W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) NewtonSchulz(U)  Liu et al., eq. 4

    ``matrices`` says how many matrices a parameter holds, one below the other; each is made orthogonal by itself, such
    as q, k and v of one projection. A sharded parameter (FSDP2) keeps its momentum sharded; its update is gathered, and
    made whole by every process.

    On a GPU the iteration runs in bfloat16. On a CPU its precision is that of the first step, which training states
    keep with the groups: see `precision_here`.

    Args:
        groups: Of parameters; those with ``matrices`` have two axes.
        lr: Learning rate.
        momentum: mu.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float = 0.95):
        super().__init__(groups, lr=lr)
        for group in self.param_groups:
            if "matrices" in group:
                group["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all parameters that have a gradient."""
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if "matrices" not in group]
            loss = super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            for parameter in group["params"] if "matrices" in group else ():
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        if "momentum" not in state:
            state["momentum"], state["step"] = torch.zeros_like(gradient), torch.zeros(())  # AdamW asks all for a step
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = whole(gradient.lerp(state["momentum"], group["momentum"]))
        precision = {"cuda": "bfloat16"}.get(update.device.type, "float32")
        if update.device.type == "cpu":
            precision = group.setdefault("precision", precision_here())
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        update = torch.cat([orthogonal(each, dtype) for each in update.chunk(group["matrices"])])
        rows, columns = parameter.shape[0] // group["matrices"], parameter.shape[1]
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, whole. Shape: -> same."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX512-BF16, or AMX, which comes with it)."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def precision_here() -> str:
    """Of the iteration in a run that begins on this CPU: "bfloat16", as in Jordan et al., where it multiplies that;
    else "float32", and with ``D_EMO_KERNELS=fixed``."""
    return "bfloat16" if multiplies_bfloat16() and not kernels.asked_fixed() else "float32"


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of a matrix U S V^T: five steps of Newton-Schulz; the singular values end between 0.7 and 1.2.

    A matrix of zeros stays one.

    Args:
        matrix: Of rank two.
        dtype: Of the iteration.

    Shape: (rows, columns) -> same.
    """
    x = matrix.to(dtype)
    x = x.mT if (tall := len(x) > x.shape[1]) else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)
