"""Kernels for NVIDIA GPUs, written in Triton; imported only where one is there."""

from __future__ import annotations

from collections.abc import Callable

import torch

from d_emo.kernels.gpu import attention, local

CHECKS: tuple[Callable[[torch.device], None], ...] = (attention.check, local.check)
"""One for each kernel: raises unless it runs on the device and equals its plain form."""


def check(device: torch.device) -> None:
    """Try every kernel on small maps, whatever is going on around.

    Raises:
        Exception: A kernel does not compile, does not run, or computes something else.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for one in CHECKS:
            one(device)
