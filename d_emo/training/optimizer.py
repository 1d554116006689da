"""The optimizer's parameter groups and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import nn

from d_emo.config import RunSettings
from d_emo.tables import OPTIMIZERS, load


def make_optimizer(
    model: nn.Module, settings: RunSettings, lr_scales: dict[str, float], device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer that decays matrices and kernels, not biases, norms and scales; fused where the device has it.

    Args:
        model: Its trainable parameters are optimised.
        settings: ``learning_rate`` and ``weight_decay``; where they have it, ``optimizer``, a name of ``OPTIMIZERS``.
        lr_scales: By parameter name, where the learning rate is not that of the rest.
        device: Where the parameters are.

    Raises:
        InputError: The optimizer is not for such a model.
    """
    groups: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, lr_scales.get(name, 1.0)), {})[name] = parameter
    return load(OPTIMIZERS[getattr(settings, "optimizer", "adamw")].make)(
        model, [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()],
        lr=settings.learning_rate, fused=device.type in ("cuda", "cpu"),
    )


def adamw(model: nn.Module, groups: list[dict[str, Any]], *, lr: float, fused: bool) -> torch.optim.AdamW:
    """AdamW over groups whose ``params`` are by name."""
    return torch.optim.AdamW([{**each, "params": [*each["params"].values()]} for each in groups], lr=lr, fused=fused)


def learning_rate(settings: RunSettings, step: int) -> float:
    """Learning rate of the update that follows ``step`` done ones: linear warm-up, then constant, cosine or poly.

    "constant-cosine" is constant until the middle of the run, then cosine; "poly" falls as (1 - done)^0.9.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    first = max(warmup, settings.max_steps // 2) if settings.schedule == "constant-cosine" else warmup
    done = max(0, step - first) / max(1, settings.max_steps - first)
    if settings.schedule == "poly":
        return peak * (1 - done) ** 0.9
    return peak * 0.5 * (1 + math.cos(math.pi * done))
