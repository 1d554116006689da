"""Loss curves: read from the TensorBoard logs of run folders, drawn beside the published ones of the same models."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from d_emo.config import check_values
from d_emo.errors import InputError
from d_emo.files import read_json, replacing
from d_emo.lab.reporting import logarithmic, new_figure
from d_emo.tables import family_of

PANELS = ("loss", "mse", "vb")
"""What is drawn, where a run has it: the loss and, for the eps objective, its two parts."""


@dataclass
class Curve:
    """Values by step, steps ascending. Shape: both (N,)."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self, window: int) -> Curve:
        """Each value replaced by the mean of those logged in the last ``window`` steps, itself among them."""
        totals, last = np.cumsum([0.0, *self.values]), np.arange(1, len(self.steps) + 1)
        first = np.minimum(np.searchsorted(self.steps, self.steps - window, side="right"), last - 1)
        return Curve(self.steps, (totals[last] - totals[first]) / (last - first))


@dataclass
class Run:
    """What a run folder tells about its training."""

    folder: Path
    settings: dict[str, Any]
    curves: dict[str, Curve]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.settings["model"].replace("/", "-")


def read_run(folder: str | Path) -> Run:
    """Read a run folder's settings and logged scalars; where a resumed run repeated a step, its later value counts.

    Raises:
        InputError: There is no such run, or nothing is logged in it.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    if not any((folder / "logs").glob("events.*")):
        raise InputError(f"{folder} has no TensorBoard logs in {folder / 'logs'}")
    log = EventAccumulator(str(folder / "logs"), size_guidance={"scalars": 0})  # 0: all points
    log.Reload()
    curves = {}
    for tag in log.Tags()["scalars"]:
        points = {event.step: event.value for event in sorted(log.Scalars(tag), key=lambda event: event.wall_time)}
        steps, values = zip(*sorted(points.items()), strict=True)
        curves[tag] = Curve(np.array(steps), np.array(values))
    if "loss" not in curves:
        raise InputError(f"no loss is logged in {folder / 'logs'} yet; the run's `log_every` says when it will be")
    hints = {"model": str, "objective": str | None}
    settings = read_json(folder / "config.yaml", lambda found: check_values({"model": found["model"], **found}, hints))
    return Run(folder, settings, curves)


def published_curves() -> dict[str, Curve]:
    """The published training losses on ImageNet 256 x 256 by model name; the source stands in the file."""
    text = resources.files("d_emo.lab").joinpath("published_loss.csv").read_text(encoding="utf-8")
    (_, *names), *rows = csv.reader(line for line in text.splitlines() if not line.startswith("#"))
    steps, *losses = np.array(rows, dtype=np.float64).T
    return {name: Curve(steps.astype(np.int64), values) for name, values in zip(names, losses, strict=True)}


def choose_published(runs: list[Run], wanted: str = "auto") -> dict[str, Curve]:
    """The published curves to draw with some runs: a model's, "none", or "auto", those of the runs' models.

    Raises:
        InputError: No curve of that name is published.
    """
    known = published_curves()
    if wanted == "none":
        return {}
    if wanted == "auto":  # the loss of another objective is another quantity
        trained = {(run.model.lower(), run.settings.get("objective")) for run in runs}
        return {name: curve for name, curve in known.items()
                if {(name.lower(), family_of(name).objective), (name.lower(), None)} & trained}  # fmt: skip
    for name, curve in known.items():
        if name.lower() == wanted.replace("/", "-").lower():
            return {name: curve}
    raise InputError(f"no loss curve of {wanted} is published; there are {', '.join(known)}, auto and none")


def plot_losses(runs: list[Run], published: dict[str, Curve], output: Path, *, smooth: int = 0) -> None:
    """Draw the losses against the steps, both axes logarithmic, into a PNG.

    Each run is a line in every panel that it has values for; published curves, by model name, are dashed. Of ``smooth``
    steps, a running mean is drawn, with the values as logged behind it.
    """
    panels = [name for name in PANELS if any(name in run.curves for run in runs)]
    heights = [3, 1.4, 1.4][: len(panels)]
    figure = new_figure(9, 1.5 * sum(heights))
    from matplotlib.ticker import EngFormatter  # after what says that it is missing

    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for panel, ax in zip(panels, axes, strict=True):
        for number, run in enumerate(runs):
            if (curve := run.curves.get(panel)) is None:
                continue
            if smooth:
                ax.plot(curve.steps, curve.values, color=f"C{number}", alpha=0.2, lw=0.8)
            label = f"{run.folder} ({run.model})"
            ax.plot(curve.steps, curve.smoothed(smooth).values, color=f"C{number}", lw=1.4, label=label)
        if panel == "loss":
            for name, curve in published.items():
                ax.plot(curve.steps, curve.values, "--", color="0.25", lw=1.2, label=f"{name}, published, ImageNet 256")
            ax.legend(frameon=False)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        values = np.concatenate([line.get_ydata() for line in ax.lines])
        if values.min() > 0:
            logarithmic(ax, "y", (1, 3) if values.max() > 30 * values.min() else (1, 1.5, 2, 3, 5, 7))
        ax.set_ylabel(panel)
        ax.grid(alpha=0.3)
    axes[-1].set_xlabel("step" + (f" (running means over {smooth:,} steps)" if smooth else ""))
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
