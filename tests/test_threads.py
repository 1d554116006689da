"""Threads and readers of a process that shares its machine with others."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d_emo.threads import is_glibc, loader_workers, use_threads

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.usefixtures("one_thread")
def test_a_launched_process_takes_its_share_of_the_cores_on_a_cpu_only(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    use_threads(CPU, 2)
    assert torch.get_num_threads() == 1  # not launched: torch's own choice stays
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    use_threads(GPU, 2)
    assert torch.get_num_threads() == 1
    use_threads(CPU, 2)
    assert torch.get_num_threads() == 3
    use_threads(CPU, 7)
    assert torch.get_num_threads() == 1


def test_readers_are_shared_out_over_the_processes_of_gpus(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on a Mac
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert [loader_workers(None, GPU, count) for count in (1, 2, 3)] == [8, 6, 4]
    assert loader_workers(None, CPU, 1) == 0 and loader_workers(5, CPU, 1) == loader_workers(5, GPU, 3) == 5


FAULTS = """
import resource
import torch
from d_emo.threads import use_threads

def faults():
    def count():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    faults = []
    for _ in range(21):  # some miss the freed block by its alignment; where the heap lies is random
        before = count()
        torch.ones(10_000_000)
        faults.append(count() - before)
    return sorted(faults)[10]

untouched = faults()
use_threads(torch.device("cuda"), 1)
on_a_gpu = faults()
use_threads(torch.device("cpu"), 1)
print(untouched, on_a_gpu, faults())
"""


@pytest.mark.skipif(not is_glibc(), reason="the allocator is not glibc's")
def test_a_cpu_process_uses_its_freed_memory_again():
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # glibc's own allocator
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])  # this code, whatever is installed
    out = subprocess.run([sys.executable, "-c", FAULTS], env=environment, check=True, capture_output=True, text=True)
    untouched, on_a_gpu, kept = map(int, out.stdout.split())
    assert 5 * kept < min(untouched, on_a_gpu)


def test_other_c_libraries_are_left_alone(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(ctypes, "CDLL", None)
    for confstr in (unknown, lambda name: None):
        monkeypatch.setattr(os, "confstr", confstr)
        use_threads(CPU, 1)
    monkeypatch.delattr(os, "confstr")
    use_threads(CPU, 1)
