"""Settings of going on from a flow snapshot to one step or four: those of training, with defaults of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from d_emo.config.base import setting
from d_emo.config.paths import check_source, followed
from d_emo.config.ranges import Count, Positive
from d_emo.config.training import TrainSettings
from d_emo.errors import InputError
from d_emo.tables import DATASETS, OBJECTIVES, SomeRows, check_start, going_on_from

_FEW_STEPS = SomeRows(OBJECTIVES, lambda row: row.starts_from is not None)
_OF_DATA = ("dataset", "data_dir", "exif", "background", "flip", "num_images", "skip_corrupt", "unconditional")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """Settings of ``scripts/distill.py``; they resolve to the `TrainSettings` of the run that it is."""

    init_from: str = setting(
        help="the snapshot to go on from, or a run folder for its newest: one of flow or flow-x, or of an objective "
        "of few steps. Model, VAE, image size and, where none are named, data are its own", flag="SNAPSHOT",
        source=True, group="Fine-tuning", snapshot=True
    )
    objective: str | None = setting(
        None, "what it is trained for. Default: one-step, one-step-x from flow-x, or the snapshot's own",
        group="Objective", choices=_FEW_STEPS
    )
    fd_features: str = setting(
        help="emov2:SNAPSHOT, a classifier, of images or of the latents, in whose features the Frechet distance is "
        "taken. Report the result in another network's", snapshot=True
    )
    dataset: str | None = setting(
        None, "built-in data set. Default: the data that the snapshot was trained on", group="Data", choices=DATASETS
    )
    skip_corrupt: bool | None = setting(
        None, "pass over images that cannot be read, with their names and number. Default: as the snapshot's run, "
        "where the data are its own", resumable=True
    )
    unconditional: bool | None = setting(
        None, "one class for all images, no label dropout; --data-dir may then be flat. Default: as the snapshot's "
        "run, where the data are its own", group="Objective"
    )
    output_dir: str | None = setting(
        None, "run folder: settings, snapshots, states, samples, logs. Default: results/<run>-one-step or "
        "-four-step", resumable=True,
        group="Run", output="run"
    )
    max_steps: Count | None = setting(
        None, "optimizer steps of the whole run. Default: 5,000", resumable=True, decisive=True
    )
    learning_rate: Positive = setting(1e-5, "peak learning rate of AdamW", aliases=["--lr"])
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
    snapshot_every: Count = setting(
        1000, "steps between snapshots (with sample grids); the last step always has one", resumable=True
    )
    state_every: Count = setting(500, "steps between training states; the newest two are kept", resumable=True)

    def resolve(self, **facts: Any) -> TrainSettings:
        """The settings of the training run, in which nothing is left open.

        Args:
            facts: See `TrainSettings.resolve`.

        Raises:
            InputError: The snapshot is of an objective that none of few steps goes on from.
        """
        check_source("init_from", self.init_from)
        there = TrainSettings(init_from=self.init_from)._there()
        start = there.get("objective")
        objective = self.objective or going_on_from(start) or next(iter(_FEW_STEPS))
        if start is not None:
            check_start(objective, start)
        given = {name: value for name, value in vars(self).items() if value is not None}
        return TrainSettings(**{
            **self._data(there), **given, "objective": objective,
            "output_dir": self.output_dir or self._folder(objective),
            "max_steps": self.max_steps or (5_000 if self.epochs is None else None),
        }).resolve(**facts)

    def _data(self, there: dict[str, Any]) -> dict[str, Any]:
        """The settings of the data of the snapshot's run, where none are named."""
        if not self.dataset is self.data_dir is self.latents is None:
            return {}
        if there.get("latents") is not None:
            return {name: there[name] for name in ("latents", "flip", "unconditional") if there.get(name) is not None}
        if there.get("dataset") is there.get("data_dir") is None:
            raise InputError(f"{self.init_from} does not say what it was trained on; name its `dataset` or `data_dir`")
        return {name: there[name] for name in _OF_DATA if there.get(name) is not None}

    def _folder(self, objective: str) -> str:
        run = followed(self.init_from)
        name = (run.parents[1] if run.parent.name == "snapshots" else run).name
        return f"results/{name}-{objective.removesuffix('-x')}"
