"""What the training loop asks of a kind of model."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Dataset

from d_emo.config import RunSettings


class Task(Protocol):
    """What a training run needs to know of its model and data."""

    model: nn.Module  # a refused step leaves its buffers as they were
    dataset: Dataset
    settings: RunSettings  # resolved
    facts: dict[str, Any]  # what its settings are resolved with
    smaller: str  # a configuration to try where this one would take too long
    lr_scales: dict[str, float]  # by parameter name, where the learning rate is not that of the rest
    averaged: nn.Module | None  # the moving average of the model; the loop sets it
    step: int  # how many are done; the loop sets it

    def introduction(self) -> list[str]:
        """Lines that tell the user what is about to be trained on what."""

    def keep_classes(self, recorded: Sequence[str] | None) -> None:
        """Number the classes of the data as the training state does that is gone on from; see `in_recorded_order`."""

    def prepare(self, device: torch.device, folder: Path) -> None:
        """Move codec and tables to the device, build caches under ``folder``; may replace ``dataset``."""

    def draw(self, generator: torch.Generator, batch_size: int) -> Any:
        """All randomness of one step for the global batch; a process is given its rows of each tensor in it.

        They are tensors with a row for each image, or None, alone or in named tuples, tuples, lists and dictionaries.
        """

    def loss(self, model: nn.Module, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
        """Scalars of a micro-batch, under "loss" the one to minimise."""

    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Sums over this process's share of the held-out data, and under "count" the number of images in it."""

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """What is reported of the sums of `validate` over all processes, its "count" left in."""

    def remarks(self, count: Callable[[torch.Tensor], Any]) -> list[str]:
        """Lines for the end of a run; ``count`` tells how many are true in any process. Shape: (n,) bool."""

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        """Write the averaged model."""
