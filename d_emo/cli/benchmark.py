"""``d-emo benchmark``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from d_emo.config import BenchmarkSettings
from d_emo.lab.benchmark import run_benchmark, table, write_report


def run(settings: BenchmarkSettings) -> None:
    """Measure, print the table and, where a folder is named, write it."""
    report = run_benchmark(settings)
    print("\n\n".join([table(report), *report.profiles]))
    if settings.output:
        write_report(Path(settings.output), report, asdict(settings))
        print(f"\nwrote {settings.output}/table.md, results.json and plot.png")
