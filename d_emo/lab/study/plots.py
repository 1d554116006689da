"""The plots of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d_emo.errors import InputError
from d_emo.lab.loss_curves import Curve
from d_emo.lab.study.results import Estimate, Row

AXES = {
    "step": "optimizer steps",
    "images": "images seen",
    "training_macs": "multiply-accumulates\nof training",
    "minutes": "minutes of training\n(steps × a step's time)",
}
"""What FID and losses are drawn against. A training step counts as three forward passes."""

BAND_SEEDS = 3
"""So many seeds a band needs: Student's interval from two is mostly wider than the whole plot."""

PUBLISHED_OVER = "eps, uniform"
"""What the published losses are the means over."""


def draw_curves(
    path: Path, rows: Sequence[Row], losses: dict[tuple[str, int], Curve], names: Sequence[str],
    published: dict[str, Curve],
) -> None:
    """FID of the runs above, their smoothed losses below, a row for each thing that a loss is the mean over.

    They are drawn against steps, images, multiply-accumulates and minutes; the FID of runs that are measured at one
    step only, run by run. Lines are means over seeds, bands 95 % confidence intervals.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install 'd-emo[plot]'") from None
    by_run = {name: mine for name in names if (mine := [row for row in rows if row["run"] == name])}
    styles = {name: run_style(number, name) for number, name in enumerate(by_run)}
    shown = [row for mine in by_run.values() for row in mine]
    once = len({row["step"] for row in shown}) == 1
    kinds = list(dict.fromkeys(row["loss_over"] for row in shown))
    heights = [0.8 + 0.24 * len(by_run) if once else 2.8, 2.5 * len(kinds) + 0.08 * len(by_run)]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, height_ratios=heights)
    if once:
        draw_dots(upper.subplots(), by_run, styles)
    else:
        draw_courses(upper.subplots(1, len(AXES), sharey=True), by_run, styles)
    grid = lower.subplots(len(kinds), len(AXES), sharex="col", sharey="row", squeeze=False)
    for kind, panels in zip(kinds, grid, strict=True):
        alike = {name: mine for name, mine in by_run.items() if mine[0]["loss_over"] == kind}
        draw_losses(panels, alike, losses, styles)
        panels[0].set_title(f"loss over {kind}", fontsize="medium", loc="left")
        for name, curve in published.items() if kind == PUBLISHED_OVER else ():
            panels[0].plot(curve.steps, curve.values, ":", color="0.25", label=f"{name}, published")
    name_axes(grid[-1])
    lines = {line.get_label(): line for panel in (*grid[:, 0], *upper.axes[:1]) for line in panel.lines}
    order = [name for name in (*styles, *(f"{name}, published" for name in published)) if name in lines]
    lower.legend([lines[name] for name in order], order, loc="outside upper center", ncols=5, frameon=False,
                 fontsize="small")  # fmt: skip
    figure.supxlabel(seeds_words(shown), fontsize="small")
    figure.savefig(path, dpi=160)


def draw_courses(panels: Sequence[Any], by_run: dict[str, list[Row]], styles: dict[str, dict[str, Any]]) -> None:
    """FID against each of `AXES`."""
    for name, mine in by_run.items():
        units = per_step(mine[0])
        steps = sorted({row["step"] for row in mine})
        fids = [[row["fid"] for row in mine if row["step"] == step] for step in steps]
        for axis, panel in zip(AXES, panels, strict=True):
            band(panel, np.array(steps) * units[axis], fids, marker="o", **styles[name])
    for panel in panels:
        dress(panel)
        logarithmic(panel, "y")
    name_axes(panels)
    panels[0].set_ylabel("FID")


def per_step(row: Row) -> dict[str, float]:
    """How far one step of a run goes on each of `AXES`."""
    images = row["images"] / row["step"]
    return {
        "step": 1, "images": images, "training_macs": 3 * row["macs"] * images,
        "minutes": row["seconds_per_step"] / 60,
    }  # fmt: skip


def name_axes(panels: Sequence[Any]) -> None:
    """What each of the panels is drawn against."""
    for title, panel in zip(AXES.values(), panels, strict=True):
        panel.set_xlabel(title)
    panels[-1].xaxis.set_major_formatter("{x:,g}")  # half a minute is not "500m"


def draw_dots(panel: Any, by_run: dict[str, list[Row]], styles: dict[str, dict[str, Any]]) -> None:
    """FID of runs measured at one step: a line for each run, from the top, with its seeds and their mean."""
    for place, (name, mine) in enumerate(by_run.items()):
        fids, colour = [row["fid"] for row in mine], styles[name]["color"]
        panel.plot(fids, [place] * len(fids), "o", ms=4, color=colour, alpha=0.6)
        panel.plot(np.mean(fids), place, "|", ms=13, mew=2.5, color=colour)
    first = next(iter(by_run))
    panel.axvline(np.mean([row["fid"] for row in by_run[first]]), color="0.5", lw=0.8, zorder=0)
    panel.set_yticks(range(len(by_run)), by_run)
    panel.set_ylim(len(by_run) - 0.4, -0.6)
    dress(panel)
    panel.xaxis.set_major_formatter("{x:g}")
    fids = [row["fid"] for mine in by_run.values() for row in mine]
    wide = max(fids) > 4 * min(fids) > 0
    if wide:
        logarithmic(panel, "x")
    words = f"FID at step {by_run[first][0]['step']:,}{' (log axis)' if wide else ''}"
    panel.set_xlabel(f"{words}; dots: seeds, bars: their means, thin line: mean of {first}")


def draw_losses(
    panels: Sequence[Any], by_run: dict[str, list[Row]], losses: dict[tuple[str, int], Curve],
    styles: dict[str, dict[str, Any]],
) -> None:
    """Running means, over a twentieth of the training, against each of `AXES`."""
    for name, rows in by_run.items():
        mine = [curve for (run, _), curve in losses.items() if run == name]
        if not mine:  # a run that measures the weights of another
            continue
        length, units = min(len(curve.steps) for curve in mine), per_step(rows[0])
        smooth = [curve.smoothed(int(curve.steps[-1]) // 20).values[:length] for curve in mine]
        for axis, panel in zip(AXES, panels, strict=True):
            band(panel, mine[0].steps[:length] * units[axis], np.stack(smooth, axis=1), **styles[name])
    for panel in panels:
        dress(panel)
        logarithmic(panel, "y")
    panels[0].set_ylabel("training loss,\nrunning mean")


def run_style(number: int, name: str) -> dict[str, Any]:
    """Of the lines of a run: ten colours, then the same ones dashed."""
    return {"color": f"C{number % 10}", "ls": "-" if number < 10 else "--", "label": name}


def dress(panel: Any) -> None:
    """A light grid and few ticks, such as 20k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def logarithmic(panel: Any, name: str) -> None:
    """A log axis with its numbers written out, several in each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(panel, f"set_{name}scale")("log")
    axis = getattr(panel, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def band(panel: Any, x: np.ndarray, values: Sequence[Sequence[float]], **style: Any) -> None:
    """A line through the means, and a band over their 95 % confidence intervals, cut at a fifth of the mean.

    The cut keeps it positive, for log axes. Points of fewer than `BAND_SEEDS` seeds have no band.
    """
    estimates = [Estimate.of(list(each)) for each in values]
    means = np.array([estimate.mean for estimate in estimates])
    panel.plot(x, means, lw=1.5, ms=4, **style)
    if all(estimate.count >= BAND_SEEDS for estimate in estimates):
        half = np.array([estimate.half_width for estimate in estimates])
        panel.fill_between(x, np.maximum(means - half, 0.2 * means), means + half, alpha=0.15, color=style["color"])


def seeds_words(rows: Sequence[Row]) -> str:
    """What lines and bands are, for the reader of a plot."""
    seeds = {name: len({row["seed"] for row in rows if row["run"] == name}) for name in {row["run"] for row in rows}}
    if max(seeds.values()) == 1:
        return "one seed: no intervals"
    words = "lines: means over the seeds"
    if max(seeds.values()) >= BAND_SEEDS:
        words += "; bands: 95 % confidence intervals of the mean"
        if min(seeds.values()) < BAND_SEEDS:
            words += f", for runs of {BAND_SEEDS} seeds or more"
    return words


def draw_gaps(path: Path, gaps: Sequence[Row]) -> None:
    """Error in train mode over that in eval mode, by noise level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["run"] for row in gaps)):
        mine = [row for row in gaps if row["run"] == name]
        levels = sorted({row["timestep"] for row in mine})
        ratios = [[row["train"] / row["eval"] for row in mine if row["timestep"] == t] for t in levels]
        dashes = ("-", "--", ":")[number % 3]  # runs without a batch norm lie on one another, at 1
        band(panel, np.array(levels), ratios, color=f"C{number}", ls=dashes, label=name)
    panel.axhline(1, color="0.5", lw=0.8)
    panel.set_xlabel("timestep (1000 is noise)")
    panel.set_ylabel("error in train mode over eval mode")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.supxlabel(seeds_words(gaps), fontsize="small")
    figure.savefig(path, dpi=110)
