"""Threads and readers of a process that shares its machine with others."""

import os

import pytest
import torch

from d_emo.data.cores import loader_workers, use_cores

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.usefixtures("one_thread")
def test_a_launched_process_takes_its_share_of_the_cores_on_a_cpu_only(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    use_cores(CPU, 2)
    assert torch.get_num_threads() == 1  # not launched: torch's own choice stays
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    use_cores(GPU, 2)
    assert torch.get_num_threads() == 1
    use_cores(CPU, 2)
    assert torch.get_num_threads() == 3
    use_cores(CPU, 7)
    assert torch.get_num_threads() == 1


def test_readers_are_shared_out_over_the_processes_of_gpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert [loader_workers(None, GPU, count) for count in (1, 2, 3)] == [8, 6, 4]
    assert loader_workers(None, CPU, 1) == 0 and loader_workers(5, CPU, 1) == loader_workers(5, GPU, 3) == 5
