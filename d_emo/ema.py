"""Exponential moving average of a model: its parameters and its float buffers (BatchNorm statistics)."""

import copy
import math

import torch
from torch import nn

from d_emo.text import plural
from d_emo.weights import load_weights

START_SHARE = 0.05
"""How much of an average may still be the weights before training."""


class EMA:
    """Keeps a second model whose parameters and float buffers trail those of the first; all else is copied.

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
        self._followed, self._pairs = None, []

    @property
    def current_decay(self) -> float:
        """Decay of the next update."""
        return self._decay_at(self.step)

    @property
    def start_share(self) -> float:
        """How much of the average is still the weights that it began with, from 1 to 0."""
        if not self.warmup:
            return self.decay**self.step
        return math.prod(self._decay_at(step) for step in range(min(self.step, 100)))  # 1e-12 of them by then

    def advice(self) -> str | None:
        """What to set where the average has seen too few steps to forget its start; None where it has."""
        if self.start_share <= START_SHARE:
            return None
        tenth = f", or `ema_decay` {1 - 10 / self.step:.4g}, which averages over a tenth" if self.step > 20 else ""
        return (
            f"the averaged weights are still to {100 * self.start_share:.1f} % those before training: `ema_decay` "
            f"{self.decay:g} needs more than {plural(self.step, 'step')}; give `ema_warmup`{tenth}"
        )

    def _decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average one step towards ``model``.

        Raises:
            ValueError: The two models do not have the same tensors.
        """
        if self._followed is not model:
            self._followed, self._pairs = model, pairs(self.model, model)
        averaged, sources, counts, copied = [], [], [], []
        for (mine, theirs), name in self._pairs:
            value, source = mine[name], theirs[name]
            frozen = isinstance(source, nn.Parameter) and not source.requires_grad  # averaged, -0.0 would become 0.0
            source = source.full_tensor() if hasattr(source, "full_tensor") else source  # sharded
            if value.is_floating_point() and not frozen:
                averaged.append(value)
                sources.append(source.to(value))
            else:
                counts.append(value)
                copied.append(source)
        if counts:
            torch._foreach_copy_(counts, copied)
        torch._foreach_lerp_(averaged, sources, 1 - self.current_decay)
        self.step += 1

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        load_weights(self.model, state["model"], "its moving average")
        self.step = state["step"]


def pairs(first: nn.Module, second: nn.Module) -> list[tuple[tuple[dict, dict], str]]:
    """Where two models keep the tensors of their state dicts: both dictionaries, and the tensor's name in them.

    To be looked up once: ``state_dict()`` itself takes milliseconds, at every step.

    Raises:
        ValueError: The two models do not have the same tensors.
    """
    mine, theirs = places(first), places(second)
    if mine.keys() != theirs.keys():
        raise ValueError(f"the averaged model lacks or adds {sorted(mine.keys() ^ theirs.keys())}")
    return [((kept, theirs[path][0]), name) for path, (kept, name) in mine.items()]


def places(model: nn.Module) -> dict[str, tuple[dict, str]]:
    """By its name in the state dict, the dictionary that holds a tensor, and its name there."""
    return {
        f"{path}.{name}": (kept, name)
        for path, module in model.named_modules()
        for kept in (module._parameters, module._buffers)
        for name, value in kept.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
