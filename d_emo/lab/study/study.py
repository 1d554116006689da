"""A study from end to end: encode, train the judge, train and measure every run, report."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import shlex
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from d_emo.config import ClassifierSettings, StudySettings, parse_settings
from d_emo.errors import InputError, RunError
from d_emo.io.card import describe_hardware
from d_emo.io.snapshot import load_denoiser, load_meta
from d_emo.io.training_state import step_of
from d_emo.lab.loss_curves import published_curves
from d_emo.lab.study.checks import check_inputs, check_measuring, check_same_latents, check_same_training
from d_emo.lab.study.cost import cost_table, speed_key, step_times
from d_emo.lab.study.execution import ScriptError, as_flags, claim, run_script, writing
from d_emo.lab.study.measuring import Meter
from d_emo.lab.study.plan import PlannedRun, as_arguments, latent_shape_of, latents_folder, plan_runs
from d_emo.lab.study.plots import draw_curves, draw_gaps
from d_emo.lab.study.report import FIGURES, plural, write_report
from d_emo.lab.study.results import Row, add_measurement, collect, read_json, read_measurements, size_of, write_json
from d_emo.latents.shards import INDEX
from d_emo.sampling import draw_grid

GAPS, COLUMNS = "norm_gap.json", 10
PARTS = (
    "class, shape, colour and ground are the shares of drawings in which it sees what was asked for, empty that of "
    "drawings without a shape."
)
WHOLE = "class is the share of drawings that it takes for what was asked for."
CUT_SHORT = (
    " At equal time a slower run is read between its snapshots, before its learning rate has fallen to the end: that "
    "speaks against it."
)

TILE = 96
"""Least side, in pixels, of a drawing in the grid of samples."""


class Study:
    """What ``scripts/compare.py`` does.

    Args:
        settings: Of the study.
        scripts: Folder of this project's scripts.

    Raises:
        InputError: Settings that cannot work, or others than what is there was made with.
    """

    def __init__(self, settings: StudySettings, *, scripts: Path):
        self.settings, self.scripts, self.folder = settings, scripts, Path(settings.output_dir)
        self.runs = plan_runs(settings)
        check_measuring(settings, self.runs)
        self.classifier, self._classifier_config = None, None
        if settings.judge is not None:
            self.classifier = self._locate_judge(settings.judge)
        if settings.plan:
            return
        if not settings.report_only:
            check_inputs(settings)
        check_same_latents(settings)
        for run in self.runs:
            check_same_training(run)

    def _locate_judge(self, judge: str) -> Path:
        path = Path(judge)
        if path.is_dir():
            return path
        if not path.is_file():
            raise InputError(f"the study's judge {judge} is neither a classifier's run folder nor a training config")
        self._classifier_config = parse_settings(ClassifierSettings, "", ["--config", judge])
        return Path(self._classifier_config.output_dir)

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
            self._encode(settings.encode)
        if self._classifier_config is not None:
            self._train_judge()
        wanted = [run for run in self.runs if run.name in (settings.only or settings.runs)]
        failed: dict[Path, str] = {}
        for number, run in enumerate(wanted, 1):
            called = f"{run.name}, seed {run.seed}"
            with claim(run.folder) as lock:
                if lock is None:
                    print(f"[{number}/{len(wanted)}] {called}: another process works on it")
                    continue
                if run.folder in failed:
                    continue
                check_same_training(run)
                try:
                    if not run.is_trained():
                        print(f"[{number}/{len(wanted)}] {called}", flush=True)
                        self._train(run, lock)
                    self._measure(run, lock)
                except ScriptError as error:
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

    def _encode(self, options: dict[str, Any]) -> None:
        output = latents_folder(self.settings)
        with claim(output, wait=True) as lock:
            check_same_latents(self.settings)
            if not (output / INDEX).exists():
                self._script("encode_latents", [*as_flags(options), "--output", str(output)], lock)

    def _train_judge(self) -> None:
        config = self._classifier_config
        with claim(Path(config.output_dir), wait=True) as lock:
            if not (Path(config.output_dir) / "snapshots" / f"step-{config.max_steps}").is_dir():
                self._script("train_classifier", ["--config", self.settings.judge], lock)

    def _train(self, run: PlannedRun, lock: TextIO) -> None:
        config = run.folder.with_suffix(".yaml")
        config.write_text(as_arguments(run.training))
        self._script("train_dit", ["--config", str(config)], lock)

    def _script(self, name: str, arguments: list[str], lock: TextIO) -> None:
        run_script(self.scripts / f"{name}.py", arguments, launch=self.settings.launch, lock=lock)

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
            if self.classifier is not None:
                figures = self.meter.measure(snapshot, norm_buffers=run.norm_buffers)
            else:
                figures = self._fid(snapshot, lock)
            add_measurement(run, step_of(snapshot), figures)
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"{run.name}, seed {run.seed}, step {step_of(snapshot)}: {shown}", flush=True)
        real = self._real_file()
        if self.classifier is not None and not real.exists():
            write_json(real, self.meter.measure_real(run.snapshots()[-1]))
        gaps = run.folder / GAPS
        if run.name in self.settings.norm_gap and not gaps.exists():
            write_json(gaps, self.meter.norm_gap(run.snapshots()[-1]))

    def _fid(self, snapshot: Path, lock: TextIO) -> dict[str, float]:
        """The figures that scripts/fid.py gives a snapshot."""
        settings, output = self.settings, snapshot.parent / f".{snapshot.name}-fid.json"
        options = {"num_images": settings.num_images, "guidance_scale": settings.guidance_scale} | (settings.fid or {})
        self._script("fid", [
            "--checkpoint", str(snapshot), "--reference", settings.reference, "--output", str(output),
            *as_flags(options),
        ], lock)  # fmt: skip
        result = read_json(output)
        return {name: result[name] for name in FIGURES if name in result}

    def report(self) -> Path:
        """Write the report of what has been measured; returns its file.

        Where it is not known how long a step takes, this is measured first.

        Raises:
            InputError: Nothing has been measured yet, or matplotlib is not installed.
        """
        settings, folder = self.settings, Path(self.settings.report_dir)
        last = settings.measure == "last"  # runs shared with another study may have more measurements
        sizes = {run.name: size_of(run, latent_shape_of(settings, run.training)) for run in self.runs}
        if not any(read_measurements(run, last=last) for run in self.runs):
            raise InputError(f"nothing of the study in {self.folder} is measured yet")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the report's folder {folder} cannot be made: {error.strerror}") from None
        times = self._step_times()
        seconds = {run.name: times["seconds"][speed_key(run, settings)] for run in self.runs}
        rows, losses = collect(self.runs, sizes, seconds, last=last)
        shown = list(dict.fromkeys(name for names in settings.tables.values() for name in names))
        published = published_curves() if settings.published_loss else {}
        draw_curves(folder / "curves.png", rows, losses, shown, published)
        pictures = [("curves.png", "FID and training loss against steps, images, arithmetic and time")]
        gaps = self._gaps()
        if gaps:
            draw_gaps(folder / "norm_gap.png", gaps)
            pictures.append(("norm_gap.png", "Error in train mode over eval mode by noise level"))
        if self._draw_grid(folder / "samples.png", shown, rows):
            pictures.append(("samples.png", "Drawings by each run, from the same noise, of the classes named above"))
        return write_report(
            folder, title=settings.title, introduction=self._introduction(rows, times["hardware"]),
            tables=settings.tables, rows=rows, losses=losses, gaps=gaps, pictures=pictures,
        )  # fmt: skip

    def _step_times(self) -> dict[str, Any]:
        """How long a step of each of this study's models takes, timed together and once."""
        keys = "\n".join(sorted({speed_key(run, self.settings) for run in self.runs}))
        path = self.folder / f"step_times-{hashlib.sha256(keys.encode()).hexdigest()[:8]}.json"
        with claim(self.folder, wait=True):
            if not path.exists():
                print("timing a training step of every model, in turns", flush=True)
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                seconds = step_times(self.settings, self.runs)
                write_json(path, {"hardware": describe_hardware(device), "seconds": seconds})
        return read_json(path)

    def _gaps(self) -> list[Row]:
        found = [(run, run.folder / GAPS) for run in self.runs if run.name in self.settings.norm_gap]
        return [
            {"run": run.name, "seed": run.seed, **level}
            for run, path in found if path.exists() for level in read_json(path)
        ]  # fmt: skip

    def _introduction(self, rows: list[Row], timed_on: str) -> list[str]:
        """What was done, and the command that does it again."""
        settings, first = self.settings, self.runs[0]
        measured = {row["run"] for row in rows}
        counts = {len({row["seed"] for row in rows if row["run"] == name}) for name in measured}
        seeds = plural(max(counts), "seed")
        if len(counts) > 1:
            seeds = f"{min(counts)} to {seeds}, as the tables say"
        snapshots = [load_meta(run.snapshots()[-1]) for run in self.runs if run.name in measured and run.snapshots()]
        hardware = ", ".join(dict.fromkeys(meta["hardware"] for meta in snapshots))
        if settings.judge is not None:
            samplers = " and ".join(f"{value} ({key})" for key, value in settings.samplers.items())
            how = (
                f"Measured with {settings.num_images:,} drawings of each snapshot (averaged weights), classes in turn, "
                f"guidance {settings.guidance_scale:g}, {samplers}. FID, precision and recall are in the features of a "
                f"classifier of the same classes ({self._judge_name()}) and compare with nothing outside this study; "
                + (PARTS if any("empty" in row for row in rows) else WHOLE)
            ) + self._real_words()
        else:
            how = f"Measured by `scripts/fid.py` against `{settings.reference}`, {settings.num_images:,} drawings."
        return [
            f"Made by `python scripts/compare.py {config_flags()}`: {seeds}, "
            f"{first.training.max_steps:,} steps of {first.training.batch_size}, trained on {hardware}. Time is the "
            f"number of steps times the median time of one, measured of all models in turns, step by step, on "
            f"{timed_on}, without reading data." + CUT_SHORT * (first.training.schedule == "cosine"),
            how,
        ]

    def _judge_name(self) -> str:
        config = self._classifier_config
        return f"`{self.settings.judge}`" + ("" if config is None else f", an {config.model}")

    def _real_file(self) -> Path:
        return self.folder / f"held-out-{self.runs[0].protocol}.json"

    def _real_words(self) -> str:
        """What real held-out images measure, in a sentence."""
        path = self._real_file()
        figures = read_json(path) if path.exists() else None
        if not figures:
            return ""
        count = figures.pop("images")
        shown = [f"{FIGURES[key].title} {value:.{FIGURES[key].digits}f}" for key, value in figures.items()]
        return f" {count:,} real held-out images measure: {', '.join(shown)}."

    def _draw_grid(self, path: Path, names: list[str], rows: list[Row]) -> bool:
        """Ten classes, named on top, from the same noise by each run of the first seed at its last measured step."""
        drawn, captions, classes = [], [], []
        for run in self.runs:
            steps = [row["step"] for row in rows if row["run"] == run.name and row["seed"] == run.seed]
            if run.name not in names or run.seed != self.settings.seeds[0] or not steps or run.name in captions:
                continue
            opened = load_denoiser(run.folder / "snapshots" / f"step-{max(steps)}")
            count = len(opened.class_names)
            labels = [i * (count - 1) // (COLUMNS - 1) for i in range(COLUMNS)]
            drawn += self.meter.draw(opened, labels, run.norm_buffers)
            classes = [opened.class_names[label] for label in labels]
            captions.append(run.name)
        if drawn:
            side = drawn[0].shape[-1]
            scale = math.ceil(TILE / side)
            grid = draw_grid(
                torch.cat(drawn), captions, COLUMNS, scale=scale, names=classes, text_size=side * scale // 7
            )
            grid.save(path)
        return bool(drawn)


def config_flags() -> str:
    """The configs that this process was started with, for the report."""
    words = sys.argv
    return shlex.join(part for word, file in itertools.pairwise(words) if word == "--config" for part in (word, file))
