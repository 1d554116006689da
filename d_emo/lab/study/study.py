"""A study from end to end: encode, train the classifier that measures, train and measure every run, report."""

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import pandas as pd

from d_emo.claims import is_claimed
from d_emo.config import ClassifierSettings, StudySettings, parse_settings
from d_emo.errors import InputError, RunError
from d_emo.files import locked, read_json, remove_left, write_json
from d_emo.io.training_state import step_of
from d_emo.lab.loss_curves import published_curves
from d_emo.lab.reporting import make_folder
from d_emo.lab.study.checks import check_classes, check_inputs, check_measuring, check_same_latents, check_same_training
from d_emo.lab.study.cost import cost_table, read_step_times, size_of, speed_key
from d_emo.lab.study.execution import VerbError, run_verb, writing
from d_emo.lab.study.measuring import Meter, draw_samples
from d_emo.lab.study.plan import PlannedRun, fid_options, latent_shape_of, latents_folder, plan_runs
from d_emo.lab.study.plots import draw_curves, draw_gaps
from d_emo.lab.study.report import held_out_file, introduction, write_report
from d_emo.lab.study.results import REMAKE, RESUME, add_measurement, collect, metric_values, read_measurements
from d_emo.latents.shards import INDEX
from d_emo.text import plural

GAPS = "norm_gap.json"


class Study:
    """What ``d-emo compare`` does.

    Raises:
        InputError: Settings that cannot work, or others than what is there was made with.
    """

    def __init__(self, settings: StudySettings):
        self.settings = settings
        self.runs = plan_runs(settings)
        check_measuring(settings, self.runs)
        self.classifier = None if settings.judge is None else Path(settings.judge)
        self._classifier_config = None
        if self.classifier is not None and not self.classifier.is_dir():
            if not self.classifier.is_file():
                raise InputError(f"`judge` {settings.judge} is neither a classifier's run folder nor a training config")
            self._classifier_config = parse_settings(ClassifierSettings, "", ["--config", settings.judge])
            self.classifier = Path(self._classifier_config.output_dir)
        if settings.plan:
            return
        if not settings.report_only:
            check_inputs(settings)
        check_same_latents(settings)
        if self.classifier is not None and not settings.report_only:
            check_classes(settings, self.runs, self.classifier, self._classifier_config)
        for run in self.runs:
            check_same_training(run)

    def plan(self) -> str:
        """What the study will cost on this machine, as a table."""
        return cost_table(self.settings, self.runs)

    @writing("the study's folder")
    def work(self) -> list[str]:
        """Do what is left to do; runs that another process works on are passed over.

        Returns:
            Name and seed of the runs that failed; the others go on without them.
        """
        settings = self.settings
        if settings.encode is not None:
            latents = latents_folder(settings)
            self._make("encode", {**settings.encode, "output": str(latents)}, latents, latents / INDEX)
            check_same_latents(settings)  # which another process may have encoded meanwhile
        if (config := self._classifier_config) is not None:
            last = self.classifier / "snapshots" / f"step-{config.max_steps}"
            self._make("train-classifier", asdict(config), self.classifier, last)
        wanted = [run for run in self.runs if run.name in (settings.only or settings.runs)]
        failed: dict[Path, str] = {}
        for number, run in enumerate(wanted, 1):
            called = f"{run.name}, seed {run.seed}"
            with locked(run.folder) as lock:
                if lock is None:
                    print(f"[{number}/{len(wanted)}] {called}: another process works on it")
                    continue
                if run.folder in failed:
                    continue
                if not is_claimed(run.folder):
                    remove_left(run.folder / "*")
                check_same_training(run)
                try:
                    if not run.is_trained():
                        print(f"[{number}/{len(wanted)}] {called}", flush=True)
                        self._run("train", asdict(run.training), run.folder, lock)
                    self._measure(run, lock)
                except VerbError as error:
                    failed[run.folder] = called
                    print(f"{called}: {error}; the other runs go on", file=sys.stderr, flush=True)
        return list(failed.values())

    def _run(self, verb: str, settings: dict[str, Any], output: Path, lock: TextIO) -> None:
        """Run a verb that makes ``output``, with its config beside that."""
        config = output.with_name(f"{output.name}.yaml")
        run_verb(verb, settings, config, launch=self.settings.launch, lock=lock)

    def _make(self, verb: str, settings: dict[str, Any], output: Path, done: Path) -> None:
        """Run a verb that makes ``output``, unless ``done`` says that somebody has, to the end."""
        with locked(output, wait=True) as lock:
            if not done.exists() or is_claimed(output):
                self._run(verb, settings, output, lock)

    @functools.cached_property
    def meter(self) -> Meter:
        """Opened when it is first needed."""
        return Meter(self.settings, self.classifier)

    def _measure(self, run: PlannedRun, lock: TextIO) -> None:
        """Measure the snapshots that have not been."""
        snapshots, own = run.snapshots(), self.classifier is not None
        for snapshot in snapshots if self.settings.measure == "all" else snapshots[-1:]:
            if step_of(snapshot) in read_measurements(run):
                continue
            values = self.meter.measure(snapshot, run.norm_buffers) if own else self._fid(snapshot, lock)
            add_measurement(run, step_of(snapshot), values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{run.name}, seed {run.seed}, step {step_of(snapshot)}: {shown}", flush=True)
        real, gaps = held_out_file(self.settings, self.runs), run.folder / GAPS
        if own and not real.exists():
            with locked(real.parent, wait=True):
                remove_left(real)
                if not real.exists():
                    write_json(real, self.meter.measure_real(snapshots[-1]), RESUME)
        if run.name in self.settings.norm_gap and not gaps.exists():
            write_json(gaps, self.meter.norm_gap(snapshots[-1]), RESUME)

    def _fid(self, snapshot: Path, lock: TextIO) -> dict[str, float]:
        """The metric values that ``d-emo fid`` gives a snapshot."""
        output = snapshot.with_name(f".{snapshot.name}-fid.json")
        options = {**fid_options(self.settings), "checkpoint": str(snapshot), "output": str(output), "overwrite": True}
        self._run("fid", options, output, lock)
        return read_json(output, lambda found: {name: found[name] for name in metric_values() if name in found}, REMAKE)

    def _is_measured(self) -> bool:
        return any(read_measurements(run, last=self.settings.measure == "last") for run in self.runs)

    def conclude(self, failed: list[str]) -> None:
        """Write the report of what there is, then end on the runs that failed.

        Raises:
            RunError: Some failed, or the report cannot be written.
        """
        if not failed or self._is_measured():
            with writing("the report"):
                print(f"report    {self.report()}", flush=True)
        if failed:
            raise RunError(f"{plural(len(failed), 'run')} failed: {'; '.join(failed)}")

    def report(self) -> Path:
        """Write the report of what has been measured; returns its file.

        Where it is not known how long a step takes, this is measured first.

        Raises:
            InputError: Nothing has been measured yet, or the folder cannot be made.
        """
        settings, runs, folder = self.settings, self.runs, Path(self.settings.report_dir)
        if not self._is_measured():
            raise InputError(f"nothing of the study in {settings.output_dir} is measured yet")
        make_folder(folder, "the report's folder")
        times, costs = read_step_times(settings, runs), {}
        for run in runs:
            parameters, macs = size_of(run.training, latent_shape_of(settings, run.training))
            seconds = times["seconds"][speed_key(run, settings)]
            costs[run.name] = {"seconds_per_step": seconds, "parameters": parameters, "macs": macs}
        with locked(Path(settings.output_dir), wait=True):  # else two that end together mix their reports
            remove_left(folder / "*")
            return self._write_report(folder, times["hardware"], costs)

    def _write_report(self, folder: Path, hardware: str, costs: dict[str, dict[str, float]]) -> Path:
        """Write the files of the report."""
        settings, runs = self.settings, self.runs
        rows, losses = collect(runs, costs, last=settings.measure == "last")  # others may share runs and measure more
        shown = list(dict.fromkeys(name for names in settings.tables.values() for name in names))
        draw_curves(folder / "curves.png", rows, losses, shown, published_curves() if settings.published_loss else {})
        plots = {"curves.png": "FID and training loss against steps, compute and time"}
        gaps = pd.DataFrame([
            {"run": run.name, "seed": run.seed, **level} for run in runs
            if run.name in settings.norm_gap and (run.folder / GAPS).exists()
            for level in read_json(run.folder / GAPS, list, REMAKE)
        ])  # fmt: skip
        if not gaps.empty:
            draw_gaps(folder / "norm_gap.png", gaps)
            plots["norm_gap.png"] = "Error in train mode over eval mode by noise level"
        first = [run for run in runs if run.name in shown and run.seed == settings.seeds[0]]
        if draw_samples(folder / "samples.png", first, rows, lambda: self.meter):
            plots["samples.png"] = "Drawings by each run, from the same noise, of the classes named above"
        config = self._classifier_config
        classifier = f"`{settings.judge}`" + ("" if config is None else f", {config.model}")
        said = introduction(settings, runs, rows, hardware, classifier)
        return write_report(folder, title=settings.title, introduction=said, tables=settings.tables, rows=rows,
                            losses=losses, gaps=gaps, plots=plots)  # fmt: skip
