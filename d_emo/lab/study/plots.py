"""The plots of a study."""

import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from d_emo.files import replacing
from d_emo.lab.loss_curves import Curve
from d_emo.lab.reporting import logarithmic, new_figure
from d_emo.lab.study.results import half_width, runs_of
from d_emo.tables import family_of

AXES: dict[str, Callable[[pd.Series], float]] = {
    "optimizer steps": lambda row: 1,
    "images seen": lambda row: row.images / row.step,
    "compute of training\n(multiply-accumulates, T = 10¹²)": lambda row: 3 * row.macs * row.images / row.step,
    "minutes of training\n(steps × a step's time)": lambda row: row.seconds_per_step / 60,
}
"""What FID and losses are drawn against, and how much of it a step of a row's run is: three forward passes, say."""

LEGIBLE, COLUMNS = 6, 4
"""So many lines can be told apart in a panel; more get a panel each, in so many columns."""

BAND_SEEDS = 3
"""So many seeds a band needs: Student's interval from two is mostly wider than the whole plot."""

TITLE = 110
"""So many characters of a title fit into the width."""

DECADE = (1, 1.5, 2, 3, 4, 5, 7)
"""Numbers on a log axis."""


def draw_curves(
    path: Path, rows: pd.DataFrame, losses: pd.DataFrame, names: Sequence[str], published: dict[str, Curve]
) -> None:
    """FID of the runs above, their smoothed losses below, in a part for each thing that a loss is the mean over.

    They are drawn against steps, compute and minutes, and against images where runs differ in their batch; the FID of
    runs that are measured at one step only, run by run, and the losses of more than `LEGIBLE` runs in a panel each.
    Lines are means over seeds, bands 95 % confidence intervals.
    """
    by_run = runs_of(rows, names)
    few, shown = len(by_run) <= LEGIBLE, pd.concat(by_run.values())
    styles = {name: {"color": f"C{number if few else 0}", "label": name} for number, name in enumerate(by_run)}
    batches = (shown.images / shown.step).nunique()
    axes = {title: unit for title, unit in AXES.items() if title != "images seen" or batches > 1}
    once, smooth = shown.step.nunique() == 1, {}
    for name, mine in by_run.items():
        if (losses.run == name).any():
            smooth.setdefault(mine.loss_over.iloc[0], {})[name] = running_means(losses[losses.run == name])
    heights = [0.8 + 0.24 * len(by_run) if once else 2.8]  # in inches
    rows_of = {kind: math.ceil(max(1, len(courses) - 1) / COLUMNS) for kind, courses in smooth.items()}
    heights += [2.8 if few else 0.7 + 1.6 * count for count in rows_of.values()]
    figure = new_figure(10, sum(heights) + 0.3)
    upper, *lower = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    if once:
        draw_dots(upper.subplots(), by_run, styles)
    else:
        fids = {name: mine.pivot(index="step", columns="seed", values="fid") for name, mine in by_run.items()}
        draw_courses(upper.subplots(1, len(axes), sharey=True), axes, by_run, fids, styles, "FID", marker="o")
    for part, (kind, courses) in zip(lower, smooth.items(), strict=True):
        title = f"training loss of the {in_words(kind)}"
        if not few:
            draw_multiples(part, courses)
            title += f"; grey: {next(iter(courses))}"
        else:
            panels = part.subplots(1, len(axes), sharey=True)
            draw_courses(panels, axes, by_run, courses, styles, "training loss,\nrunning mean")
            for name, curve in published.items():
                if kind == f"{family_of(name).objective}, uniform":
                    panels[0].plot(curve.steps, curve.values, ":", color="0.25", label=f"{name}, published")
        part.suptitle(textwrap.fill(title, TITLE), x=0.01, ha="left", fontsize="medium")
    if few:
        lines = {line.get_label(): line for part in (*lower, upper) for line in part.axes[0].lines}
        order = [name for name in (*styles, *(f"{name}, published" for name in published)) if name in lines]
        figure.legend([lines[name] for name in order], order, loc="outside upper center", ncols=5, frameon=False)
    figure.supxlabel(seeds_words(shown), fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


def in_words(loss_over: str) -> str:
    """What `results.loss_over` names: "eps, logit-normal 0 1" is an objective and how its timesteps are drawn."""
    objective, drawn, *terms = loss_over.split(", ")
    sampling, *numbers = drawn.split()
    words = f"{objective} objective, {sampling} timesteps"
    words += f" (mean {numbers[0]}, standard deviation {numbers[1]})" if numbers else ""
    return ", ".join([words, *terms])


def draw_courses(
    panels: Sequence[Any], axes: dict[str, Callable[[pd.Series], float]], by_run: dict[str, pd.DataFrame],
    courses: dict[str, pd.DataFrame], styles: dict[str, dict[str, Any]], what: str, **style: Any,
) -> None:
    """Values by step and seed of some runs, against each of ``axes``."""
    for (title, unit), panel in zip(axes.items(), panels, strict=True):
        for name, course in courses.items():
            band(panel, course.set_axis(course.index * unit(by_run[name].iloc[0])), **style, **styles[name])
        dress(panel)
        panel.set_xlabel(title)
    values = pd.concat(course.stack() for course in courses.values())
    for panel in panels if values.min() > 0 else ():
        logarithmic(panel, "y", DECADE)
    panels[-1].xaxis.set_major_formatter("{x:,g}")  # half a minute is not "500m"
    panels[0].set_ylabel(what)


def draw_multiples(part: Any, courses: dict[str, pd.DataFrame]) -> None:
    """A panel for each run's values by step and seed, with the first run's behind them; or the first alone."""
    first, *others = courses
    others = others or [first]
    grid = part.subplots(math.ceil(len(others) / COLUMNS), COLUMNS, sharex=True, sharey=True, squeeze=False)
    for panel, name in zip_longest(grid.flat, others):
        panel.set_visible(name is not None)
        if name is not None:
            band(panel, courses[first], color="0.6", label=first)
            band(panel, courses[name], color="C0", label=name)
            dress(panel)
            panel.set_title(name, fontsize="medium")
    late = pd.concat(course[course.index > course.index[-1] / 10].stack() for course in courses.values())
    if late.min() > 0:  # that of an aligned run may be below
        logarithmic(grid[0, 0], "y", DECADE)
    grid[0, 0].set_ylim(late.min() - 0.1 * abs(late.min()), late.max())  # the steep beginning is the same in all
    part.supxlabel("optimizer steps", fontsize="medium")


def running_means(losses: pd.DataFrame) -> pd.DataFrame:
    """A run's loss by step and seed, as far as all seeds go: means over the last twentieth of the training."""
    curves = {seed: Curve(mine.step.to_numpy(), mine.loss.to_numpy()) for seed, mine in losses.groupby("seed")}
    smooth = {seed: curve.smoothed(int(curve.steps[-1]) // 20).values for seed, curve in curves.items()}
    return pd.DataFrame({seed: pd.Series(smooth[seed], curve.steps) for seed, curve in curves.items()}).dropna()


def draw_dots(panel: Any, by_run: dict[str, pd.DataFrame], styles: dict[str, dict[str, Any]]) -> None:
    """FID of runs measured at one step: a line for each run, from the top, with its seeds and their mean."""
    for place, (name, mine) in enumerate(by_run.items()):
        colour = styles[name]["color"]
        panel.plot(mine.fid, [place] * len(mine), "o", ms=4, color=colour, alpha=0.6)
        panel.plot(mine.fid.mean(), place, "|", ms=13, mew=2.5, color=colour)
    first, fids = next(iter(by_run)), pd.concat(by_run.values()).fid
    panel.axvline(by_run[first].fid.mean(), color="0.5", lw=0.8, zorder=0)
    panel.set_yticks(range(len(by_run)), by_run)
    panel.set_ylim(len(by_run) - 0.4, -0.6)
    dress(panel)
    panel.xaxis.set_major_formatter("{x:g}")
    wide = fids.max() > 4 * fids.min() > 0
    if wide:
        logarithmic(panel, "x", DECADE)
    words = f"FID at step {by_run[first].step.iloc[0]:,}{' (log axis)' if wide else ''}"
    panel.set_xlabel(f"{words}; dots: seeds, bars: their means, thin line: mean of {first}")


def dress(panel: Any) -> None:
    """A light grid and few ticks, such as 20k."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(6))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def band(panel: Any, values: pd.DataFrame, **style: Any) -> None:
    """A line through the means over the columns (seeds), and a band over their 95 % confidence intervals.

    The band of a positive mean is cut at a fifth of it, for log axes. It needs `BAND_SEEDS` seeds.
    """
    means, counts = values.mean(axis=1), values.count(axis=1)
    panel.plot(values.index, means, lw=1.5, ms=4, **style)
    if (counts >= BAND_SEEDS).all():
        half = half_width(values.sem(axis=1), counts)
        lower = (means - half).where(means <= 0, np.maximum(means - half, 0.2 * means))
        panel.fill_between(values.index, lower, means + half, alpha=0.15, color=style["color"])


def seeds_words(rows: pd.DataFrame) -> str:
    """What lines and bands are, for the reader of a plot."""
    seeds = rows.groupby("run").seed.nunique()
    if seeds.max() == 1:
        return "one seed: no intervals"
    words = "lines: means over the seeds"
    if seeds.max() >= BAND_SEEDS:
        words += "; bands: 95 % confidence intervals of the mean"
        if seeds.min() < BAND_SEEDS:
            words += f", for runs of {BAND_SEEDS} seeds or more"
    return words


def draw_gaps(path: Path, gaps: pd.DataFrame) -> None:
    """Error in train mode over that in eval mode, by noise level."""
    figure = new_figure(7, 4)
    panel = figure.subplots()
    ratios = gaps.assign(ratio=gaps.train / gaps["eval"])
    for number, (name, mine) in enumerate(ratios.groupby("run", sort=False)):
        dashes = ("-", "--", ":")[number % 3]  # runs without a batch norm lie on one another, at 1
        by_seed = mine.pivot(index="timestep", columns="seed", values="ratio")
        band(panel, by_seed, color=f"C{number}", ls=dashes, label=name)
    panel.axhline(1, color="0.5", lw=0.8)
    panel.set_xlabel("timestep (1000 is noise)")
    panel.set_ylabel("error in train mode over eval mode")
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)
    figure.supxlabel(seeds_words(gaps), fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
