"""What a study has found so far: measurements on disk, a table of all of them, and intervals over the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import t as student

from d_emo.config import TrainSettings
from d_emo.errors import InputError
from d_emo.files import read_json, write_json
from d_emo.lab.loss_curves import read_run
from d_emo.lab.study.plan import PlannedRun
from d_emo.models import create_model
from d_emo.models.contract import DenoiserFrame
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.registry import frame_of
from d_emo.tables import DATASETS, MetricValue, class_values, with_present_names
from d_emo.tables import metric_values as all_metric_values

RESUME = "nothing that was measured before is lost; re-run the same command to resume"
REMAKE = "remove it and re-run the same command to make it again"


def metric_values() -> dict[str, MetricValue]:
    """What the tables of a report show, in their order: the loss, FID, class accuracy, then the other metrics."""
    by_classes = {value.name for data in DATASETS for value in class_values(data)}
    measured = sorted(all_metric_values().values(), key=lambda each: (each.name != "fid", each.name not in by_classes))
    loss = MetricValue(name="loss", title="loss", digits=5, better=-1)
    titled = (replace(value, title=f"{value.title} {value.unit}".strip()) for value in measured)
    return {value.name: value for value in (loss, *titled)}


def digits_of(value: MetricValue) -> int:
    """After the point of a mean over seeds: one less than a single measurement shows."""
    return 2 if value.digits is None else value.digits - 1


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


def size_of(run: PlannedRun, latent_shape: Sequence[int]) -> tuple[int, int]:
    """Parameters (with a label table for 1000 classes) and multiply-accumulates of a run's model, for one latent."""
    with torch.device("meta"):
        model = new_model(run.training, latent_shape)
        return count_parameters(model), count_macs(model)


def new_model(training: TrainSettings, latent_shape: Sequence[int]) -> DenoiserFrame:
    """A run's model before its training, for 1000 classes; InputError for a classifier."""
    frame = frame_of(training.model)
    if frame is None:
        raise InputError(f"{training.model} is a classifier; a study compares denoisers")
    options = frame.settings_for(tuple(latent_shape), 1000)
    return create_model(training.model, **options | (training.model_options or {}))


def collect(
    runs: Iterable[PlannedRun], sizes: dict[str, tuple[int, int]], seconds: dict[str, float], *, last: bool = False
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for every measured snapshot, and one for every logged loss of every trained run.

    The loss of a snapshot is the mean over the last tenth of the steps so far. ``sizes`` are parameters and
    multiply-accumulates by name, ``seconds`` those of a training step; with ``last``, only the snapshots at the end.
    """
    rows, losses = [], []
    for run in runs:
        measured = read_measurements(run, last=last)
        if not measured:
            continue
        curve, each = read_run(run.folder).curves["loss"], {"run": run.name, "seed": run.seed}
        if run.norm_buffers == "trained":
            losses.append(pd.DataFrame({**each, "step": curve.steps, "loss": curve.values}))
        parameters, macs = sizes[run.name]
        rows += [
            {**each, "step": step, "images": step * run.training.batch_size, "minutes": step * seconds[run.name] / 60,
             "seconds_per_step": seconds[run.name], "parameters": parameters, "macs": macs,
             "loss": float(curve.values[(curve.steps > 0.9 * step) & (curve.steps <= step)].mean()),
             "loss_over": loss_over(run.training), **values}
            for step, values in measured.items()
        ]  # fmt: skip
    return pd.DataFrame(rows), pd.concat(losses) if losses else pd.DataFrame(columns=["run", "seed", "step", "loss"])


def loss_over(training: TrainSettings) -> str:
    """What a run's loss is the mean over, such as "eps, uniform": only losses over the same can be compared."""
    if training.timestep_sampling == "uniform":
        return f"{training.objective}, uniform"
    return f"{training.objective}, {training.timestep_sampling} {training.logit_mean:g} {training.logit_std:g}"


def runs_of(rows: pd.DataFrame, names: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The rows of these runs by name, of those that have any."""
    found = dict(list(rows.groupby("run")))
    return {name: found[name] for name in names if name in found}


def last_common_step(rows: pd.DataFrame, names: Sequence[str]) -> int | None:
    """The last step at which all of these runs have been measured; None if there is none."""
    found = runs_of(rows, names)
    common = set.intersection(*(set(mine.step) for mine in found.values())) if len(found) == len(names) else set()
    return max(common, default=None)


def paired(rows: pd.DataFrame, name: str, other: str, step: int) -> pd.DataFrame:
    """Two runs at one step side by side, a row for each seed that both have; the other's columns end in "_other"."""
    at = rows[rows.step == step]
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
