"""Settings of a study: models, objectives and seeds trained and measured alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from d_emo.config.base import Settings, setting
from d_emo.config.ranges import Images, NotNegative, Seed
from d_emo.config.sampling import DEFAULT_STEPS, read_sampler
from d_emo.errors import InputError
from d_emo.tables import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class StudySettings(Settings):
    """Settings of ``scripts/compare.py``; ``configs/study/`` has some."""

    title: str = setting(help="heading of the report", group="Study")
    output_dir: str = setting(
        help="folder of the study's latents and runs; what is complete there is reused", output="shared"
    )
    report_dir: str = setting(
        help="folder of the report: report.md, CSV files, plots and sample grids", output="shared"
    )
    encode: dict[str, Any] | None = setting(
        None, "settings of d-emo encode: encode the data once, for all runs. Default: the runs name data",
        group="Training",
    )
    data_dir: str | None = setting(
        None, "with encode: the images, as --data-dir of d-emo encode", source=True
    )
    train: dict[str, Any] = setting(help="settings of d-emo train that all runs share")
    runs: dict[str, dict[str, Any]] = setting(
        help="by name, settings of d-emo train that differ between runs; model_options are added to the "
        "shared ones. {of: NAME, norm_buffers: initial} measures another run's weights with the batch norms' running "
        "statistics as they were before training"
    )
    seeds: list[Seed] = setting([0, 1, 2], "every run is trained once with each seed")
    tables: dict[str, list[str]] | None = setting(
        None, "tables of the report: heading, then names of runs; the first is what the others are compared with. "
        "Default: one table of all runs", group="Report",
    )
    launch: list[str] = setting(
        [], "arguments of accelerate launch for training, encoding and d-emo fid, e.g. [--num_processes, '8']. "
        "Default: one process, without the launcher", group="Training",
    )
    judge: str | None = setting(
        None, "measure by a classifier of the same classes: its training config, or the folder of its run. A config is "
        "trained first, where its run is not complete", group="Measurement", source=True,
    )
    reference: str | None = setting(
        None, "measure by d-emo fid against these real images (or statistics), instead of by a classifier",
        source=True,
    )
    fid: dict[str, Any] | None = setting(None, "with --reference: further settings of d-emo fid")
    measure: Literal["all", "last"] = setting("all", "every snapshot of a run, or the last one only")
    num_images: Images = setting(1000, "samples for each measurement")
    guidance_scale: NotNegative = setting(1.0, "classifier-free guidance scale; 1 is no guidance, as in most tables")
    samplers: dict[str, str] | None = setting(
        None, "sampler and steps by objective, for --judge and for sample grids. Default: {eps: 'dpm++:30', flow: "
        "'euler:30'}"
    )
    norm_gap: list[str] = setting(
        [], "runs of the eps objective whose error is measured in train and in eval mode, by noise level"
    )
    published_loss: bool = setting(
        False, "plot the published losses (ImageNet 256 x 256) beside the runs'", group="Report"
    )
    only: list[str] = setting(
        [], "train and measure these runs only; the report still shows all that are complete", group="Execution"
    )
    report_only: bool = setting(False, "train and measure nothing, only write the report of what is complete")
    plan: bool = setting(False, "train nothing: measure each model's speed here and print the cost of the study")

    def check(self) -> None:
        if (self.judge is None) == (self.reference is None):
            raise InputError("give a study either `judge` (a classifier) or `reference` (for d-emo fid)")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise InputError(f"`seeds` {self.seeds} must be different numbers, at least one")
        if self.data_dir is not None:
            if self.encode is None:
                raise InputError(f"`data_dir` {self.data_dir} is for studies that encode their data; this one does not")
        if not self.runs:
            raise InputError("a study needs at least one run")
        for each in (self.samplers or {}).values():
            read_sampler(each)
        tables = self.tables or {}
        named = [name for names in (*tables.values(), self.norm_gap, self.only) for name in names]
        named += [run["of"] for run in self.runs.values() if "of" in run]
        known = ", ".join(map(repr, self.runs))
        for name in named:
            if name not in self.runs:
                raise InputError(f"the study names a run {name!r} that it does not have; it has {known}")
        for heading, names in tables.items():
            if not names:
                raise InputError(f"the table {heading!r} of the study names no runs")

    def resolve(self, **facts: Any) -> StudySettings:
        """The images to encode, a sampler for every objective, and tables of all runs where none are named."""
        samplers = {name: f"{row.scheduler}:{row.steps or DEFAULT_STEPS}" for name, row in OBJECTIVES.items()}
        encode = self.encode if self.data_dir is None else {**self.encode, "data_dir": self.data_dir}
        return replace(
            self, encode=encode, samplers=samplers | (self.samplers or {}),
            tables=self.tables or {"All runs": list(self.runs)},
        )
