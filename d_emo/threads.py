"""A process's fraction of the machine's CPUs, and the memory that it works with."""

import ctypes
import os

import torch

from d_emo.errors import InputError


def thread_count() -> int:
    """CPUs that this process may run on; fewer than the machine's where it has been bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_launch(processes: int) -> None:
    """Refuse processes that a launcher started and that do not know of each other.

    Raises:
        InputError: There are not ``processes`` of them, as many as this one knows of.
    """
    if (started := int(os.environ.get("WORLD_SIZE", 1))) != processes:
        raise InputError(
            f"the launcher started {started} processes, but without GPUs they do not know of each other; for several "
            "processes on a CPU start them with `accelerate launch --cpu`"
        )


def use_threads(device: torch.device, processes: int) -> None:
    """On a CPU, let torch use this process's fraction of the CPUs: `accelerate launch` sets one thread, unasked.

    There the process also keeps its freed memory, see `keep_freed_memory`.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher's mark
        torch.set_num_threads(max(1, thread_count() // processes))


MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1), "M_TOP_PAD": (-2, 64 * 2**20), "M_ARENA_MAX": (-8, 1)}
"""Settings of glibc's allocator, by the numbers of its malloc.h: nothing by mmap, nothing given back, one heap."""


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step; elsewhere nothing happens.

    By itself it gives the large maps of every step back to the system, which then has to clear each of their pages
    again: up to a quarter of a small network's step.
    """
    if is_glibc():
        for name, value in MALLOPT.values():
            ctypes.CDLL(None).mallopt(name, value)


def is_glibc() -> bool:
    """Whether the C library of this process is glibc."""
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):  # no such function, no such name, no such value
        return False


def loader_workers(asked: int | None, device: torch.device, processes: int) -> int:
    """How many processes read data for this one; none on a CPU unless ``asked`` says so."""
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(8, thread_count() // processes)
