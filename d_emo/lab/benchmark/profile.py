"""Where the time of a step goes: the operators of every case, side by side."""

import os
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from d_emo.device import synchronize
from d_emo.lab.benchmark.timing import Case
from d_emo.text import markdown_table

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its starts and stops otherwise

SHOWN = 12
"""Operators that get a line of their own: those that take the most time, in all cases together."""


def operator_times(case: Case, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by operator, without the operators inside it, on a GPU by kernel; means of the rounds."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        for _ in range(rounds):
            case.run()
        synchronize(device)
    events = profiler.key_averages()
    if on_gpu:  # the operators' own entries and the names given to spans would count the same kernels again
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        times = {event.key: event.self_device_time_total for event in kernels}
    else:
        times = {event.key: event.self_cpu_time_total for event in events}
    return {name: microseconds / 1e3 / rounds for name, microseconds in times.items() if microseconds > 0}


def profile_table(cases: Sequence[Case], *, rounds: int, device: torch.device) -> str:
    """A markdown table of milliseconds: a line for an operator, a column for each case of one group."""
    times = [operator_times(case, rounds, device) for case in cases]
    together = {name: sum(column.get(name, 0) for column in times) for column in times for name in column}
    names = sorted(together, key=together.__getitem__, reverse=True)[:SHOWN]
    totals = [sum(column.values()) for column in times]
    rows = {f"`{name}`": [column.get(name, 0) for column in times] for name in names}
    rows["all others"] = [total - sum(shown) for total, *shown in zip(totals, *rows.values(), strict=True)]
    rows["all"] = totals
    head = [f"{cases[0].group}, ms", *(case.name for case in cases)]
    return markdown_table(head, ([title, *(f"{value:,.1f}" for value in row)] for title, row in rows.items()))
