"""Kernels for NVIDIA GPUs, written in Triton; imported only where one is there."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from d_emo.kernels.gpu import attention, local, spanning

CHECKS: tuple[Callable[[torch.device], None], ...] = (attention.check, local.check, spanning.check)
"""One for each kernel: raises unless it runs on the device and equals its plain form, or others take its place."""


def check(device: torch.device) -> None:
    """Try every kernel on small maps, whatever is going on around.

    That is why it has a thread of its own: autograd's modes and hooks (a checkpointed block would be computed anew
    within the trial, and what the trial saves be counted as a network's), autocast, function transforms, fake tensors
    and the default device are a thread's own.

    Raises:
        Exception: A kernel does not compile, does not run, or computes something else.
    """

    def trial() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a thread starts with the first
        for one in CHECKS:
            one(device)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(trial).result()
