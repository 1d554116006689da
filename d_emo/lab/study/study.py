"""A study from end to end: encode, train the classifier that measures, train and measure every run, report."""

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from d_emo.config import ClassifierSettings, StudySettings, parse_settings
from d_emo.errors import InputError, RunError
from d_emo.files import locked, read_json, write_json
from d_emo.io.training_state import step_of
from d_emo.lab.study.checks import check_classes, check_inputs, check_measuring, check_same_latents, check_same_training
from d_emo.lab.study.conclusion import GAPS, conclude, held_out_file
from d_emo.lab.study.cost import cost_table
from d_emo.lab.study.execution import VerbError, run_verb, writing
from d_emo.lab.study.measuring import Meter
from d_emo.lab.study.plan import PlannedRun, fid_options, latents_folder, plan_runs
from d_emo.lab.study.results import REMAKE, RESUME, add_measurement, metric_values, read_measurements
from d_emo.lab.text import plural
from d_emo.latents.shards import INDEX


class Study:
    """What ``d-emo compare`` does.

    Raises:
        InputError: Settings that cannot work, or others than what is there was made with.
    """

    def __init__(self, settings: StudySettings):
        self.settings, self.folder = settings, Path(settings.output_dir)
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

    def conclude(self, failed: list[str]) -> None:
        """Write the report of what there is, then end on the runs that failed.

        Raises:
            RunError: Some failed, or the report cannot be written.
        """
        last = self.settings.measure == "last"
        if not failed or any(read_measurements(run, last=last) for run in self.runs):
            with writing("the report"):
                print(f"report    {self.report()}", flush=True)
        if failed:
            raise RunError(f"{plural(len(failed), 'run')} failed: {'; '.join(failed)}")

    def report(self) -> Path:
        """Write the report of what has been measured; returns its file."""
        config = self._classifier_config
        classifier = f"`{self.settings.judge}`" + ("" if config is None else f", an {config.model}")
        return conclude(self.settings, self.runs, classifier=classifier, open_meter=lambda: self.meter)

    def _run(self, verb: str, settings: dict[str, Any], output: Path, lock: TextIO) -> None:
        """Run a verb that makes ``output``, with its config beside that."""
        config = output.with_name(f"{output.name}.yaml")
        run_verb(verb, settings, config, launch=self.settings.launch, lock=lock)

    def _make(self, verb: str, settings: dict[str, Any], output: Path, done: Path) -> None:
        """Run a verb that makes ``output``, unless ``done`` says that somebody has."""
        with locked(output, wait=True) as lock:
            if not done.exists():
                self._run(verb, settings, output, lock)

    @functools.cached_property
    def meter(self) -> Meter:
        """Opened when it is first needed."""
        return Meter(self.settings, self.classifier)

    def _measure(self, run: PlannedRun, lock: TextIO) -> None:
        """Measure the snapshots that have not been."""
        snapshots = run.snapshots()
        for snapshot in snapshots if self.settings.measure == "all" else snapshots[-1:]:
            if step_of(snapshot) in read_measurements(run):
                continue
            own = self.classifier is not None
            values = self.meter.measure(snapshot, run.norm_buffers) if own else self._fid(snapshot, lock)
            add_measurement(run, step_of(snapshot), values)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{run.name}, seed {run.seed}, step {step_of(snapshot)}: {shown}", flush=True)
        real, gaps = held_out_file(self.settings, self.runs), run.folder / GAPS
        if self.classifier is not None and not real.exists():
            write_json(real, self.meter.measure_real(snapshots[-1]), RESUME)
        if run.name in self.settings.norm_gap and not gaps.exists():
            write_json(gaps, self.meter.norm_gap(snapshots[-1]), RESUME)

    def _fid(self, snapshot: Path, lock: TextIO) -> dict[str, float]:
        """The metric values that ``d-emo fid`` gives a snapshot."""
        output = snapshot.with_name(f".{snapshot.name}-fid.json")
        options = {**fid_options(self.settings), "checkpoint": str(snapshot), "output": str(output)}
        self._run("fid", options, output, lock)
        return read_json(output, lambda found: {name: found[name] for name in metric_values() if name in found}, REMAKE)
