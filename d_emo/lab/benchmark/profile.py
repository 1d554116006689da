"""Where the time of a step goes: the operators of every case, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from d_emo.lab.benchmark.timing import Case

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its starts and stops otherwise

SHOWN = 12
"""Operators that get a line of their own: those that take the most time, in all cases together."""


def operator_times(case: Case, rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by operator, without the operators inside it, on a GPU by kernel; means of the rounds."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(rounds):
            case.run()
        if on_gpu:
            torch.cuda.synchronize(device)
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
    lines = [
        f"| {cases[0].group}, ms | {' | '.join(case.name for case in cases)} |",
        f"|---|{'---:|' * len(cases)}",
        *(f"| `{name}` | {' | '.join(f'{column.get(name, 0):,.1f}' for column in times)} |" for name in names),
    ]
    totals = [sum(column.values()) for column in times]
    others = [total - sum(column.get(name, 0) for name in names) for total, column in zip(totals, times, strict=True)]
    for title, row in (("all others", others), ("all", totals)):
        lines.append(f"| {title} | {' | '.join(f'{value:,.1f}' for value in row)} |")
    return "\n".join(lines)
