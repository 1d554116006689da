"""What was measured, as a markdown table, JSON and a plot."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d_emo.files import replacing, write_file, write_json
from d_emo.lab.benchmark.timing import Case
from d_emo.lab.reporting import make_folder, new_figure
from d_emo.text import markdown_table

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second of GPUs, from their data sheets, for the utilisation."""


class Result(NamedTuple):
    """One line of the table; ``ratio`` is to the group's baseline, times in milliseconds, memory in MB."""

    group: str
    name: str
    milliseconds: float
    quartiles: tuple[float, ...]
    per_second: float
    ratio: float
    gmacs_per_second: float
    peak_megabytes: float | None
    saved_megabytes: float | None
    utilisation: float | None

    @classmethod
    def of(cls, case: Case, *, baseline: Case, batch_size: int, device: torch.device) -> Result:
        """The result of a measured case beside its group's baseline."""
        time, macs = case.median, case.macs
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" and macs else ""
        fastest = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
        return cls(
            group=case.group, name=case.name, milliseconds=1e3 * time, quartiles=tuple(1e3 * s for s in case.spread),
            per_second=batch_size / time, ratio=time / baseline.median, gmacs_per_second=macs / time / 1e9,
            peak_megabytes=case.peak_megabytes, saved_megabytes=case.saved_megabytes,
            utilisation=fastest and 2 * macs / time / fastest,
        )  # fmt: skip


@dataclass
class Report:
    """What was measured: a line of the table for each case, and the profile of each group where it was asked for."""

    baseline: str
    device: torch.device
    results: list[Result] = field(default_factory=list)
    profiles: list[str] = field(default_factory=list)


def table(report: Report) -> str:
    """A markdown table."""
    head = ["what", "network", "ms per step (quartiles)", "images/s", f"time over {report.baseline}", "GMAC/s",
            "kept for backward", "peak memory", "MFU"]  # fmt: skip

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    return markdown_table(head, words=2, rows=(
        [r.group, r.name, "{:,.1f} ({:,.1f} to {:,.1f})".format(r.milliseconds, *r.quartiles), f"{r.per_second:,.1f}",
         f"{r.ratio:.2f}", shown(r.gmacs_per_second or None, "{:.0f}"), shown(r.saved_megabytes, "{:,.0f} MB"),
         shown(r.peak_megabytes, "{:,.0f} MB"), shown(r.utilisation, "{:.0%}")]
        for r in report.results
    ))  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: *(.*\S)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    processor = named[1] if named else platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def write_report(folder: Path, report: Report, settings: dict[str, Any]) -> None:
    """Write ``table.md``, with the profiles, ``results.json`` and ``plot.png`` into a folder; else InputError."""
    picture = plot(report.results)  # first, as it needs what may be missing
    make_folder(folder, "`output`")
    where = machine(report.device)
    about = ", ".join(f"{key} {value}" for key, value in where.items())
    write_file(folder / "table.md", "\n\n".join([table(report), about, *report.profiles]) + "\n")
    said = {name: value for name, value in settings.items() if name != "output"}  # which says nothing later
    record = {"machine": where, "settings": said, "baseline": report.baseline,
              "results": [r._asdict() for r in report.results]}  # fmt: skip
    write_json(folder / "results.json", record)
    with replacing(folder / "plot.png") as temporary:
        picture.savefig(temporary, format="png", dpi=120)


def plot(results: Sequence[Result]) -> Any:
    """Images per second as bars, a panel for each group, two side by side."""
    groups = [(group, list(rows)) for group, rows in groupby(results, lambda r: r.group)]
    columns = min(2, len(groups))
    lines = [groups[start : start + columns] for start in range(0, len(groups), columns)]
    heights = [0.9 + 0.3 * max(len(rows) for _, rows in line) for line in lines]
    figure = new_figure(8, sum(heights))
    panels = figure.subplots(len(lines), columns, height_ratios=heights, squeeze=False).flat
    for number, (axes, named) in enumerate(zip_longest(panels, groups)):
        axes.set_visible(named is not None)
        if named is not None:
            group, rows = named
            ours = (row.name.startswith(("D-EMO", "emo")) and "transcription" not in row.name for row in rows)
            colours = ["tab:blue" if mine else "0.7" for mine in ours]
            bars = axes.barh([row.name for row in rows], [row.per_second for row in rows], color=colours)
            axes.bar_label(bars, [f" {row.per_second:#.3g}".rstrip(".") for row in rows], fontsize=9)
            axes.margins(x=0.15)  # for the numbers
            if number % columns and [row.name for row in rows] == [row.name for row in groups[number - 1][1]]:
                axes.tick_params(labelleft=False)  # they are written on the left
            axes.set_title(group, loc="left", fontsize=11)
            axes.set_xlabel("images per second")
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
    return figure
