"""``d-emo benchmark``."""

from pathlib import Path

from d_emo.config import BenchmarkSettings, FormsSettings, KernelsSettings
from d_emo.lab.benchmark import forms_table, kernels_table, run_benchmark, table, write_report


def run(settings: BenchmarkSettings | FormsSettings | KernelsSettings) -> None:
    """Measure, print the table and, where a folder is named, write it."""
    if isinstance(settings, FormsSettings):
        print(forms_table(settings))
        return
    if isinstance(settings, KernelsSettings):
        print(kernels_table(settings))
        return
    report = run_benchmark(settings)
    print("\n\n".join([table(report), *report.profiles]))
    if settings.output:
        write_report(Path(settings.output), report, settings.to_record())
        print(f"\nwrote {settings.output}/table.md, results.json and plot.png")
