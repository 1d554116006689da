"""On which device to compute, and how long it takes."""

import time
from collections.abc import Callable

import torch


def best_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device that was asked for, else the first that is there: CUDA, MPS, CPU."""
    if wanted is not None and str(wanted) != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(
    work: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """How long some work takes, that of the device included."""
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start
