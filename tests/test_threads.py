"""Threads and readers of a process that shares its machine with others."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d_emo.threads import is_glibc, loader_workers, spare_neighbours, use_threads

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.usefixtures("one_thread")
def test_a_launched_process_takes_its_share_of_the_cores_on_a_cpu_only(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 0)  # nobody's environment
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a launcher's
    use_threads(CPU, 2)
    assert torch.get_num_threads() == 1  # not launched: torch's own choice stays
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    use_threads(GPU, 2)
    assert torch.get_num_threads() == 1
    use_threads(CPU, 2)
    assert torch.get_num_threads() == 3
    use_threads(CPU, 7)
    assert torch.get_num_threads() == 1


@pytest.mark.usefixtures("one_thread")
def test_threads_that_the_user_asked_for_stay_in_a_launched_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    use_threads(CPU, 2)
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "OMP_NUM_THREADS": "1"}) as launcher:
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        use_threads(CPU, 2)
        launcher.kill()
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("running, chosen, spins", [
    ("2/300", {}, None), ("3/300", {}, "1000"), ("9/300", {"OMP_NUM_THREADS": "2"}, None), ("odd", {}, None),
])
def test_threads_spin_less_where_others_compute(monkeypatch, running, chosen, spins):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "put back by pytest")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: f"0.5 0.4 0.3 {running} 4242")
    spare_neighbours()
    assert os.environ.get("GOMP_SPINCOUNT") == spins


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
