"""A process's fraction of the machine's CPUs, and the memory that it works with."""

import ctypes
import os

import torch


def thread_count() -> int:
    """CPUs that this process may run on; fewer than the machine's where it has been bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(device: torch.device, processes: int) -> None:
    """On a CPU, let torch use this process's fraction of the CPUs: launchers set one thread, unasked.

    There the process also keeps its freed memory, see `keep_freed_memory`.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cpu" and {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():  # launchers'
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
