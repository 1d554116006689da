"""What a study has found so far: rows per measured snapshot, and means, intervals and differences over the seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.files import write_file
from d_emo.lab.loss_curves import Curve, read_run
from d_emo.lab.study.plan import PlannedRun
from d_emo.models import create_model
from d_emo.models.counting import count_macs, count_parameters
from d_emo.tables import with_present_names

Row = dict[str, Any]
KEPT = "nothing that was measured before is lost, and the same command goes on"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % confidence interval (Student's t); None from one seed."""

    mean: float
    half_width: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value per seed."""
        if len(values) < 2:
            return cls(mean(values), None, len(values))
        quantile = float(student.ppf(0.975, len(values) - 1))
        return cls(mean(values), quantile * stdev(values) / math.sqrt(len(values)), len(values))

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def show(self, digits: int = 2) -> str:
        """Such as "4.36 ± 0.41"."""
        return f"{self.mean:.{digits}f}" + ("" if self.half_width is None else f" ± {self.half_width:.{digits}f}")


def read_measurements(run: PlannedRun, *, last: bool = False) -> dict[int, dict[str, float]]:
    """Figures of a run's snapshots by step; with ``last``, of the one at its end only.

    Raises:
        InputError: The file of its figures is damaged.
    """
    if not run.results.exists():
        return {}
    try:
        measured = {int(step): with_present_names(values) for step, values in read_json(run.results).items()}
    except (AttributeError, TypeError, ValueError):
        raise _damaged(run.results) from None
    return {step: figures for step, figures in measured.items() if not last or step == run.training.max_steps}


def add_measurement(run: PlannedRun, step: int, figures: dict[str, float]) -> None:
    """Keep the figures of one snapshot."""
    write_json(run.results, dict(sorted({**read_measurements(run), step: figures}.items())))


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote.

    Raises:
        InputError: The file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise _damaged(path) from None


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged; remove it, and the same command makes it again")


def write_json(path: Path, value: Any) -> None:
    """Write a value; a kill or a full disk leaves the old file or the new.

    Raises:
        RunError: The disk is full, say.
    """
    write_file(path, (json.dumps(value, indent=1) + "\n").encode(), KEPT)


def size_of(run: PlannedRun, latent_shape: Sequence[int]) -> tuple[int, int]:
    """Parameters (with a label table for 1000 classes) and multiply-accumulates of a run's model, for one latent."""
    channels, side, _ = latent_shape
    options = {"sample_size": side, "in_channels": channels}
    with torch.device("meta"):
        model = create_model(run.training.model, **options | (run.training.model_options or {}))
        return count_parameters(model), count_macs(model)


def collect(
    runs: Iterable[PlannedRun], sizes: dict[str, tuple[int, int]], seconds: dict[str, float], *, last: bool = False
) -> tuple[list[Row], dict[tuple, Curve]]:
    """A row for every measured snapshot, and the loss curve of every trained run by (name, seed).

    The loss of a row is the mean over the last tenth of the steps so far.

    Args:
        runs: Of the study.
        sizes: Parameters and multiply-accumulates by name.
        seconds: Of a training step, by name.
        last: Only of the snapshots at the end.
    """
    rows, losses = [], {}
    for run in runs:
        measured = read_measurements(run, last=last)
        if not measured:
            continue
        curves, batch = read_run(run.folder).curves, run.training.batch_size
        parameters, macs = sizes[run.name]
        step_seconds = seconds[run.name]
        if run.norm_buffers == "trained":
            losses[run.name, run.seed] = curves["loss"]
        rows += [
            {"run": run.name, "seed": run.seed, "step": step, "images": step * batch,
             "minutes": step * step_seconds / 60, "seconds_per_step": step_seconds, "parameters": parameters,
             "macs": macs, "loss": recent(curves["loss"], step), "loss_over": loss_over(run.training), **figures}
            for step, figures in measured.items()
        ]  # fmt: skip
    return rows, losses


def loss_over(training: TrainSettings) -> str:
    """What a run's loss is the mean over, such as "eps, uniform": only losses over the same can be compared."""
    if training.timestep_sampling == "uniform":
        return f"{training.objective}, uniform"
    return f"{training.objective}, {training.timestep_sampling} {training.logit_mean:g} {training.logit_std:g}"


def recent(curve: Curve, step: int) -> float:
    """Mean of the values logged in the last tenth of the way to a step."""
    return float(curve.values[(curve.steps > 0.9 * step) & (curve.steps <= step)].mean())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows; columns in the order in which they first appear, empty where a row has none.

    Raises:
        RunError: The disk is full, say.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_file(path, text.getvalue().encode(), KEPT)


def values_of(rows: Sequence[Row], name: str, step: int, figure: str) -> dict[int, float]:
    """A figure of a run at one step, by seed."""
    return {r["seed"]: r[figure] for r in rows if r["run"] == name and r["step"] == step and figure in r}


def minutes_by_step(rows: Sequence[Row], name: str) -> dict[int, float]:
    """Minutes of training that a run takes to its measured steps."""
    mine = sorted((row for row in rows if row["run"] == name), key=lambda row: row["step"])
    return {row["step"]: row["step"] * row["seconds_per_step"] / 60 for row in mine}


def at_time(rows: Sequence[Row], name: str, minutes: float) -> list[float]:
    """FID of each seed after so many minutes, on straight lines between the measured steps; none before the first."""
    by_step = minutes_by_step(rows, name)
    if minutes < min(by_step.values()) - 1e-9:
        return []
    courses: dict[int, dict[int, float]] = {}
    for row in rows:
        if row["run"] == name:
            courses.setdefault(row["seed"], {})[row["step"]] = row["fid"]
    complete = [course for course in courses.values() if course.keys() == by_step.keys()]
    return [float(np.interp(minutes, list(by_step.values()), [c[step] for step in by_step])) for c in complete]


def last_common_step(rows: Sequence[Row], names: Sequence[str]) -> int | None:
    """The last step at which all of these runs have been measured; None if there is none."""
    steps = [{row["step"] for row in rows if row["run"] == name} for name in names]
    common = set.intersection(*steps) if steps else set()
    return max(common, default=None)


def same_loss(rows: Sequence[Row], name: str, other: str) -> bool:
    """Whether the losses of two runs are means over the same."""
    return len({row["loss_over"] for row in rows if row["run"] in (name, other)}) == 1


def difference(rows: Sequence[Row], name: str, other: str, step: int, figure: str) -> Estimate | None:
    """``name`` minus ``other``, seed by seed; None if they share none, or it is the loss and is not over the same."""
    if figure == "loss" and not same_loss(rows, name, other):
        return None
    ours, theirs = (values_of(rows, each, step, figure) for each in (name, other))
    shared = sorted(ours.keys() & theirs.keys())
    return Estimate.of([ours[seed] - theirs[seed] for seed in shared]) if shared else None
