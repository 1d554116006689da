"""A process's fraction of the machine's CPUs, and the memory that it works with."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def thread_count() -> int:
    """CPUs that this process may run on; fewer than the machine's where it has been bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(device: torch.device, processes: int) -> None:
    """On a CPU, let torch use this process's fraction of the CPUs: launchers set one thread, unasked.

    A number that the user gave as OMP_NUM_THREADS stays. The process also keeps its freed memory there, see
    `keep_freed_memory`.
    """
    if device.type == "cpu":
        keep_freed_memory()
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if device.type == "cpu" and launched and not _threads_asked():
        import torch

        torch.set_num_threads(max(1, thread_count() // processes))


def _threads_asked() -> bool:
    """Whether OMP_NUM_THREADS is the user's own: not the 1 of a launcher, in whose own environment there is none."""
    given = os.environ.get("OMP_NUM_THREADS", "1")
    with suppress(OSError):
        return given != "1" or b"OMP_NUM_THREADS=" in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    return given != "1"


def spare_neighbours() -> None:
    """Where others compute too, let threads that wait go to sleep soon; to be called before torch is imported.

    OpenMP's threads spin while they wait for one another. Where there is less than a CPU for each, they spin away the
    time of those that they wait for: on two CPUs with two other programs a picture of 1 s took 8 s, and takes 2.3 s so.
    Nothing that is computed depends on it. Who has set OpenMP's variables is left alone.
    """
    chosen = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if not chosen and 2 * _others_running() >= thread_count():
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _others_running() -> int:
    """How many other threads on this machine want a CPU now, the least of three looks; 0 where nothing tells."""
    looks = []
    with suppress(OSError, ValueError, IndexError):
        for _ in range(3):
            looks.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
            time.sleep(0.002)
    return min(looks, default=1) - 1


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
