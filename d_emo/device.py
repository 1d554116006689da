"""On which device to compute."""

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
