"""The plots of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d_emo.config import InputError
from d_emo.curves import Curve
from d_emo.study.results import Row

AXES = {
    "step": "optimizer steps",
    "images": "images seen",
    "training_macs": "multiply-accumulates of training",
    "minutes": "minutes of training",
}
"""What FID and loss are drawn against. A training step counts as three forward passes."""

COLOURS = [f"C{i}" for i in range(10)] + ["black", "gold", "navy", "lime", "magenta", "teal", "salmon", "indigo"]
"""Of the runs, in their order."""


def draw_curves(
    path: Path, rows: Sequence[Row], losses: dict[tuple[str, int], Curve], names: Sequence[str],
    published: dict[str, Curve],
) -> None:
    """FID and smoothed loss of the runs against steps, images, multiply-accumulates and minutes.

    Lines are means over seeds; bands go from the least to the greatest of them.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install 'd-emo[plot]'") from None
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharey="row")
    for number, name in enumerate(names):
        mine = [row for row in rows if row["run"] == name]
        if not mine:
            continue
        per_step = {
            "step": 1, "images": mine[0]["images"] / mine[0]["step"],
            "training_macs": 3 * mine[0]["macs"] * mine[0]["images"] / mine[0]["step"],
            "minutes": mine[0]["seconds_per_step"] / 60,
        }  # fmt: skip
        steps = sorted({row["step"] for row in mine})
        fids = [[row["fid"] for row in mine if row["step"] == step] for step in steps]
        curves = [curve.smoothed(int(curve.steps[-1]) // 20) for (run, _), curve in losses.items() if run == name]
        for axis, (upper, lower) in zip(AXES, panels.T, strict=True):
            style = {"color": COLOURS[number % len(COLOURS)], "label": name}
            band(upper, np.array(steps) * per_step[axis], fids, marker="o", **style)
            if curves:
                length = min(len(curve.steps) for curve in curves)
                values = np.stack([curve.values[:length] for curve in curves], axis=1)
                band(lower, curves[0].steps[:length] * per_step[axis], values, **style)
    for name, curve in published.items():
        panels[1, 0].plot(curve.steps, curve.values, "--", color="0.25", label=f"{name}, published")
    for title, (upper, lower) in zip(AXES.values(), panels.T, strict=True):
        lower.set_xlabel(title)
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
            panel.set_yscale("log")
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.spines[["top", "right"]].set_visible(False)
    for axis in (panels[0, 0].yaxis, panels[1, 0].yaxis):
        axis.set_major_formatter("{x:g}")
    panels[0, 0].yaxis.set_minor_formatter("{x:g}")
    panels[0, 0].set_ylabel("FID")
    panels[1, 0].set_ylabel("training loss, running mean")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)
    figure.savefig(path, dpi=110)


def band(panel: Any, x: np.ndarray, values: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the means, and a band between the extremes."""
    panel.plot(x, [np.mean(v) for v in values], lw=1.5, ms=4, **style)
    panel.fill_between(x, [np.min(v) for v in values], [np.max(v) for v in values], alpha=0.15, color=style["color"])


def draw_gaps(path: Path, gaps: Sequence[Row]) -> None:
    """Error in train mode over that in eval mode, by noise level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["run"] for row in gaps)):
        mine = [row for row in gaps if row["run"] == name]
        levels = sorted({row["timestep"] for row in mine})
        ratios = [[row["train"] / row["eval"] for row in mine if row["timestep"] == t] for t in levels]
        band(panel, np.array(levels), ratios, color=f"C{number}", label=name)
    panel.axhline(1, color="0.5", lw=0.8)
    panel.set_xlabel("timestep (1000 is noise)")
    panel.set_ylabel("error in train mode over eval mode")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)
