"""Measure speed: `benchmark.py denoisers` beside DiT, `benchmark.py classifiers` beside peers of timm."""

import dataclasses
import sys
from pathlib import Path

from d_emo.config import BENCHMARKS, parse_settings, run_cli
from d_emo.errors import InputError


def main() -> None:
    kind, *flags = sys.argv[1:] or [""]
    if kind not in BENCHMARKS:
        raise InputError(f"say what to measure: benchmark.py {' or benchmark.py '.join(BENCHMARKS)} (--help after it)")
    settings = parse_settings(BENCHMARKS[kind], __doc__, flags)
    from d_emo.lab.benchmark import run_benchmark, table, write_report

    report = run_benchmark(settings)
    print("\n\n".join([table(report), *report.profiles]))
    if settings.output:
        write_report(Path(settings.output), report, dataclasses.asdict(settings))
        print(f"\nwrote {settings.output}/table.md, results.json and plot.png")


if __name__ == "__main__":
    run_cli(main)
