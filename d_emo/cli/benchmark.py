"""``d-emo benchmark``."""

from pathlib import Path

from d_emo.config import BenchmarkSettings, DenseBenchmarkSettings, FormsSettings, KernelsSettings, StepSettings
from d_emo.lab.benchmark import dense_table, forms_table, kernels_table, run_benchmark, step_table, table, write_report

TABLES = {
    FormsSettings: forms_table, KernelsSettings: kernels_table, StepSettings: step_table,
    DenseBenchmarkSettings: dense_table,
}  # fmt: skip


def run(
    settings: BenchmarkSettings | FormsSettings | KernelsSettings | StepSettings | DenseBenchmarkSettings,
) -> None:
    """Measure, print the table and, where a folder is named, write it."""
    if type(settings) in TABLES:
        print(TABLES[type(settings)](settings))
        return
    report = run_benchmark(settings)
    print("\n\n".join([table(report), *report.profiles]))
    if settings.output:
        write_report(Path(settings.output), report, settings.to_record())
        print(f"\nwrote {settings.output}/table.md, results.json and plot.png")
