"""A process's share of the machine's cores."""

from __future__ import annotations

import os

import torch


def use_cores(device: torch.device, processes: int) -> None:
    """On a CPU, let torch use this process's share of the cores: `accelerate launch` sets one thread, unasked."""
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher's mark
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))


def loader_workers(asked: int | None, device: torch.device, processes: int) -> int:
    """How many processes read data for this one; none on a CPU unless ``asked`` says so."""
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(8, (os.cpu_count() or 1) // processes)
