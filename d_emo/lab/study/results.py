"""What a study has found so far: measurements on disk, a table of all of them, and intervals over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student

from d_emo.config import TrainSettings
from d_emo.files import read_json, write_json
from d_emo.lab.loss_curves import read_run
from d_emo.lab.study.plan import PlannedRun
from d_emo.tables import DATASETS, MetricValue, class_values, with_present_names
from d_emo.tables import metric_values as all_metric_values

RESUME = "nothing that was measured before is lost; re-run the same command to resume"
REMAKE = "remove it and re-run the same command to make it again"


def metric_values() -> dict[str, MetricValue]:
    """What the tables of a report show, in their order: the loss, FID, class accuracy, then the other metrics.

    A mean over seeds has a digit less than a single measurement.
    """
    by_classes = {value.name for data in DATASETS for value in class_values(data)}
    measured = sorted(all_metric_values().values(), key=lambda each: (each.name != "fid", each.name not in by_classes))
    loss = MetricValue(name="loss", title="loss", digits=4, better=-1)
    return {"loss": loss} | {
        value.name: replace(value, title=f"{value.title} {value.unit}".strip(), digits=(value.digits or 3) - 1)
        for value in measured
    }


class Estimate(NamedTuple):
    """A mean over seeds and half the width of its 95 % confidence interval (Student's t); NaN from one seed."""

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: pd.Series | Sequence[float]) -> Estimate:
        """The estimate from one value per seed; those that are missing do not count."""
        values = pd.Series(values, dtype=float).dropna()
        return cls(values.mean(), half_width(values.sem(), len(values)), len(values))

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return abs(self.mean) > self.half_width

    def show(self, digits: int = 2, *, sign: bool = False) -> str:
        """Such as "4.36 ± 0.41", "-" of nothing; with ``sign``, positive means have a plus."""
        if not self.count:
            return "-"
        plus = "+" if sign and self.mean > 0 else ""
        return f"{plus}{self.mean:.{digits}f}" + (f" ± {self.half_width:.{digits}f}" if self.count > 1 else "")


def half_width(standard_error: Any, count: Any) -> Any:
    """Half the width of Student's 95 % confidence interval, of numbers or arrays; NaN for a count of one."""
    return student.ppf(0.975, np.maximum(count, 1) - 1) * standard_error


def read_measurements(run: PlannedRun, *, last: bool = False) -> dict[int, dict[str, float]]:
    """Metric values of a run's snapshots by step; with ``last``, of the one at its end only."""
    if not run.results.exists():
        return {}
    return read_json(run.results, lambda kept: {
        int(step): with_present_names(values) for step, values in kept.items()
        if not last or int(step) == run.training.max_steps
    }, REMAKE)  # fmt: skip


def add_measurement(run: PlannedRun, step: int, values: dict[str, float]) -> None:
    """Keep the metric values of one snapshot."""
    write_json(run.results, dict(sorted({**read_measurements(run), step: values}.items())), RESUME)


def collect(
    runs: Iterable[PlannedRun], costs: dict[str, dict[str, float]], *, last: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for every measured snapshot (with ``last``, at the end of a run only), and one for every logged loss.

    The loss of a snapshot is the mean over the last tenth of the steps so far. ``costs`` are, by the run's name,
    "seconds_per_step", "parameters" and "macs".
    """
    rows, losses = [], []
    for run in runs:
        if not (measured := read_measurements(run, last=last)):
            continue
        each, cost, curve = {"run": run.name, "seed": run.seed}, costs[run.name], read_run(run.folder).curves["loss"]
        if run.norm_buffers == "trained":
            losses.append(pd.DataFrame({**each, "step": curve.steps, "loss": curve.values}))
        for step, values in measured.items():
            recent = curve.values[(curve.steps > 0.9 * step) & (curve.steps <= step)]
            minutes = step * cost["seconds_per_step"] / 60
            rows.append({**each, "step": step, "images": step * run.training.batch_size, "minutes": minutes, **cost,
                         "loss": float(recent.mean()), "loss_over": loss_over(run.training), **values})  # fmt: skip
    return pd.DataFrame(rows), pd.concat(losses) if losses else pd.DataFrame(columns=["run", "seed", "step", "loss"])


def loss_over(training: TrainSettings) -> str:
    """What a run's loss is the mean over, such as "eps, uniform": only losses over the same can be compared."""
    drawn, words = training.timestep_sampling, []
    if drawn != "uniform":
        drawn += f" {training.logit_mean:g} {training.logit_std:g}"
    if training.time_shift not in (None, 1):
        words.append(f"shift {training.time_shift}")
    if training.contrastive:
        words.append(f"contrastive {training.contrastive:g}")
    if training.align is not None:
        words.append(f"aligned with {training.align} ({training.align_weight:g})")
    return ", ".join([training.objective, drawn, *words])


def runs_of(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The rows of these runs by name, of those that have any."""
    found = dict(list(rows.groupby("run")))
    return {name: found[name] for name in names if name in found}


def last_common_step(rows: pd.DataFrame, names: Sequence[str]) -> int | None:
    """The last step at which all of these runs have been measured; None if there is none."""
    counts = rows[rows.run.isin(names)].groupby("step").run.nunique()
    return max(counts.index[counts == len(set(names))], default=None)


def at_step(rows: pd.DataFrame, step: int | None) -> pd.DataFrame:
    """The rows of one step; with None each run's of its own last one."""
    return rows[rows.step == (rows.groupby("run").step.transform("max") if step is None else step)]


def paired(rows: pd.DataFrame, name: str, other: str, step: int | None) -> pd.DataFrame:
    """Two runs side by side, see `at_step`, a row for each seed that both have; the other's columns end in "_other"."""
    at = at_step(rows, step)
    return at[at.run == name].merge(at[at.run == other], on="seed", suffixes=("", "_other"))


def difference(pairs: pd.DataFrame, value: str) -> Estimate:
    """Of two paired runs, seed by seed; of nothing if they share no seed, or if their losses are not over the same."""
    if value not in pairs or (value == "loss" and (pairs.loss_over != pairs.loss_over_other).any()):
        return Estimate.of([])
    return Estimate.of(pairs[value] - pairs[f"{value}_other"])


def minutes_by_step(mine: pd.DataFrame) -> pd.Series:
    """Minutes of training that one run takes to its measured steps."""
    seconds = mine.groupby("step").seconds_per_step.first()
    return seconds * seconds.index / 60


def at_time(mine: pd.DataFrame, minutes: float) -> list[float]:
    """One run's FID by seed after so many minutes, on lines between the measured steps; none before the first."""
    times = minutes_by_step(mine)
    if minutes < times.min() - 1e-9:
        return []
    complete = mine.pivot(index="seed", columns="step", values="fid").dropna()
    return [float(np.interp(minutes, times, course)) for course in complete.to_numpy()]
