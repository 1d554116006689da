"""``d-emo benchmark``."""

from dataclasses import asdict
from pathlib import Path

from d_emo.config import BenchmarkSettings, FormsSettings
from d_emo.lab.benchmark import forms_table, run_benchmark, table, write_report


def run(settings: BenchmarkSettings | FormsSettings) -> None:
    """Measure, print the table and, where a folder is named, write it."""
    if isinstance(settings, FormsSettings):
        print(forms_table(settings))
        return
    report = run_benchmark(settings)
    print("\n\n".join([table(report), *report.profiles]))
    if settings.output:
        write_report(Path(settings.output), report, asdict(settings))
        print(f"\nwrote {settings.output}/table.md, results.json and plot.png")
