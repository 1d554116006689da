"""Speed by the clock: ours beside a plain transcription of the block and beside others' networks, in one run."""

import sys

import torch

from d_emo.config import BenchmarkSettings, DenoiserBenchmarkSettings
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.lab.benchmark.cases import BASELINE, classifier_cases, denoiser_cases
from d_emo.lab.benchmark.dense import dense_table
from d_emo.lab.benchmark.forms import forms_table
from d_emo.lab.benchmark.kernels import kernels_table
from d_emo.lab.benchmark.profile import profile_table
from d_emo.lab.benchmark.report import Report, Result, table, write_report
from d_emo.lab.benchmark.step import step_table
from d_emo.lab.benchmark.timing import measure
from d_emo.lab.benchmark.transcription import transcribe
from d_emo.models.registry import resolve_name

__all__ = [
    "dense_table", "forms_table", "kernels_table", "run_benchmark", "step_table", "table", "transcribe", "write_report",
]  # fmt: skip


def run_benchmark(settings: BenchmarkSettings) -> Report:
    """Measure what the settings name; InputError if there is no such device."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("`device` cuda: PyTorch finds no GPU here; leave it out")
    device = best_device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if isinstance(settings, DenoiserBenchmarkSettings):
        baseline, groups = BASELINE, denoiser_cases(settings, device)
    else:
        groups = iter([classifier_cases(settings, device)])
        baseline = settings.peers[0] if settings.peers else resolve_name(settings.models[0])
    report = Report(baseline, device)
    for cases in groups:
        print(f"measuring {cases[0].group}", file=sys.stderr)
        measure(cases, rounds=settings.rounds, device=device, clock=settings.clock)
        first = next(case for case in cases if case.name == baseline)
        report.results += [
            Result.of(case, baseline=first, batch_size=settings.batch_size, device=device) for case in cases
        ]
        if settings.profile:
            report.profiles.append(profile_table(cases, rounds=settings.rounds, device=device))
        cases.clear()  # the next group's networks need the memory
    return report
