"""Exponential moving average of a model: its parameters and its float buffers (BatchNorm statistics)."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Keeps a second model whose parameters and float buffers trail those of the first; integer buffers are copied.

    Averaging the buffers matters: with parameters alone, the BatchNorm statistics of the averaged model stay at
    their start values.

    Args:
        model: The model to follow; it is copied.
        decay: Weight of the old average, in [0, 1).
        warmup: Let the decay grow as min(decay, (1 + n) / (10 + n)), so that a short run forgets its start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, warmup: bool = False):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup, self.step = decay, warmup, 0

    @property
    def current_decay(self) -> float:
        """Decay of the next update."""
        return min(self.decay, (1 + self.step) / (10 + self.step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards ``model``.

        Raises:
            ValueError: The two models do not have the same tensors.
        """
        mine, theirs = self.model.state_dict(), model.state_dict()
        if mine.keys() != theirs.keys():
            raise ValueError(f"the averaged model lacks or adds {sorted(mine.keys() ^ theirs.keys())}")
        averaged, sources = [], []
        for name, value in mine.items():
            source = theirs[name].full_tensor() if hasattr(theirs[name], "full_tensor") else theirs[name]  # sharded
            if value.is_floating_point():
                averaged.append(value)
                sources.append(source.to(value))
            else:
                value.copy_(source)
        torch._foreach_lerp_(averaged, sources, 1 - self.current_decay)
        self.step += 1

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.step = state["step"]
