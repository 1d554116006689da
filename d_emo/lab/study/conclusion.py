"""From what a study has measured to its report: step times, tables, plots, samples, and what was done, in words."""

import itertools
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from d_emo.config import StudySettings
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.files import digest, locked, read_json, write_json
from d_emo.io.card import describe_hardware
from d_emo.io.snapshot import load_denoiser, load_meta
from d_emo.lab.loss_curves import published_curves
from d_emo.lab.study.cost import speed_key, step_times
from d_emo.lab.study.measuring import Meter
from d_emo.lab.study.plan import PlannedRun, latent_shape_of
from d_emo.lab.study.plots import draw_curves, draw_gaps
from d_emo.lab.study.report import write_report
from d_emo.lab.study.results import (
    REMAKE,
    RESUME,
    collect,
    digits_of,
    metric_values,
    read_measurements,
    size_of,
)
from d_emo.lab.text import plural
from d_emo.sampling import draw_grid
from d_emo.tables import with_present_names

GAPS, COLUMNS = "norm_gap.json", 10
TILE = 96
"""Least side, in pixels, of a drawing in the grid of samples."""


def conclude(
    settings: StudySettings, runs: list[PlannedRun], *, classifier: str, open_meter: Callable[[], Meter]
) -> Path:
    """Write the report of what has been measured, by a ``classifier`` in words; returns its file.

    Where it is not known how long a step takes, this is measured first. ``open_meter`` gives what draws the samples.

    Raises:
        InputError: Nothing has been measured yet, or the folder cannot be made.
    """
    folder, last = Path(settings.report_dir), settings.measure == "last"  # others may share runs and measure more
    sizes = {run.name: size_of(run, latent_shape_of(settings, run.training)) for run in runs}
    if not any(read_measurements(run, last=last) for run in runs):
        raise InputError(f"nothing of the study in {settings.output_dir} is measured yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the report's folder {folder} cannot be made: {error.strerror}") from None
    times = read_step_times(settings, runs)
    seconds = {run.name: times["seconds"][speed_key(run, settings)] for run in runs}
    rows, losses = collect(runs, sizes, seconds, last=last)
    shown = list(dict.fromkeys(name for names in settings.tables.values() for name in names))
    draw_curves(folder / "curves.png", rows, losses, shown, published_curves() if settings.published_loss else {})
    plots = {"curves.png": "FID and training loss against steps, images, arithmetic and time"}
    gaps = pd.DataFrame([
        {"run": run.name, "seed": run.seed, **level} for run in runs
        if run.name in settings.norm_gap and (run.folder / GAPS).exists()
        for level in read_json(run.folder / GAPS, list, REMAKE)
    ])  # fmt: skip
    if not gaps.empty:
        draw_gaps(folder / "norm_gap.png", gaps)
        plots["norm_gap.png"] = "Error in train mode over eval mode by noise level"
    first = [run for run in runs if run.name in shown and run.seed == settings.seeds[0]]
    if draw_samples(folder / "samples.png", first, rows, open_meter):
        plots["samples.png"] = "Drawings by each run, from the same noise, of the classes named above"
    return write_report(
        folder, title=settings.title, introduction=introduction(settings, runs, rows, times["hardware"], classifier),
        tables=settings.tables, rows=rows, losses=losses, gaps=gaps, plots=plots,
    )  # fmt: skip


def read_step_times(settings: StudySettings, runs: list[PlannedRun]) -> dict[str, Any]:
    """How long a step of each of this study's models takes, timed together and once."""
    keys = "\n".join(sorted({speed_key(run, settings) for run in runs}))
    folder = Path(settings.output_dir)
    path = folder / f"step_times-{digest(keys)[:8]}.json"
    with locked(folder, wait=True):
        if not path.exists():
            print("timing a training step of every model, in turns", flush=True)
            seconds = step_times(settings, runs)
            write_json(path, {"hardware": describe_hardware(best_device()), "seconds": seconds}, RESUME)
    return read_json(path, lambda kept: {
        "hardware": kept["hardware"], "seconds": {key: kept["seconds"][key] for key in keys.splitlines()}
    }, REMAKE)  # fmt: skip


def held_out_file(settings: StudySettings, runs: list[PlannedRun]) -> Path:
    """Where the metric values of real held-out images are kept."""
    return Path(settings.output_dir) / f"held-out-{runs[0].protocol}.json"


def introduction(
    settings: StudySettings, runs: list[PlannedRun], rows: pd.DataFrame, timed_on: str, classifier: str
) -> list[str]:
    """What was done, and the command that does it again."""
    training, counts = runs[0].training, rows.groupby("run").seed.nunique()
    seeds = plural(counts.max(), "seed")
    if counts.nunique() > 1:
        seeds = f"{counts.min()} to {seeds}, as the tables say"
    snapshots = [run.snapshots()[-1] for run in runs if run.name in counts and run.snapshots()]
    hardware = ", ".join(dict.fromkeys(load_meta(snapshot)["hardware"] for snapshot in snapshots))
    words = itertools.pairwise(sys.argv)
    configs = shlex.join(part for word, file in words if word == "--config" for part in (word, file))
    done = (
        f"Made by `python scripts/compare.py {configs}`: {seeds}, {training.max_steps:,} steps of "
        f"{training.batch_size}, trained on {hardware}. Time is the number of steps times the median time of one, "
        f"measured of all models in turns, step by step, on {timed_on}, without reading data."
    )
    if training.schedule == "cosine":
        done += (
            " At equal time a slower run is read between its snapshots, before its learning rate has fallen to the "
            "end: that speaks against it."
        )
    if settings.reference is not None:
        return [done, f"Measured by `scripts/fid.py` against `{settings.reference}`, {settings.num_images:,} drawings."]
    samplers = " and ".join(f"{sampler} ({objective})" for objective, sampler in settings.samplers.items())
    measured = (
        f"Measured with {settings.num_images:,} drawings of each snapshot (averaged weights), classes in turn, "
        f"guidance {settings.guidance_scale:g}, {samplers}. FID, precision and recall are in the features of a "
        f"classifier of the same classes ({classifier}) and compare with nothing outside this study; class"
    ) + (
        ", shape, colour and ground are the shares of drawings in which it sees what was asked for, empty that of "
        "drawings without a shape." if "empty" in rows else
        " is the share of drawings that it takes for what was asked for."
    )  # fmt: skip
    path, values = held_out_file(settings, runs), metric_values()
    if path.exists() and (real := read_json(path, remedy=REMAKE)):
        count, real = real.pop("images"), with_present_names(real)
        shown = (f"{values[name].title} {value:.{digits_of(values[name])}f}" for name, value in real.items())
        measured += f" {count:,} real held-out images measure: {', '.join(shown)}."
    return [done, measured]


def draw_samples(path: Path, runs: list[PlannedRun], rows: pd.DataFrame, open_meter: Callable[[], Meter]) -> bool:
    """Ten classes, named on top, from the same noise by each run at its last measured step; False without any."""
    drawn, captions, classes = [], [], []
    for run in runs:
        steps = rows.step[(rows.run == run.name) & (rows.seed == run.seed)]
        if steps.empty or run.name in captions:
            continue
        opened = load_denoiser(run.folder / "snapshots" / f"step-{steps.max()}")
        labels = [i * (len(opened.class_names) - 1) // (COLUMNS - 1) for i in range(COLUMNS)]
        drawn += open_meter().draw(opened, labels, run.norm_buffers)
        classes = [opened.class_names[label] for label in labels]
        captions.append(run.name)
    if drawn:
        scale = math.ceil(TILE / drawn[0].shape[-1])
        text_size = drawn[0].shape[-1] * scale // 7
        draw_grid(torch.cat(drawn), captions, COLUMNS, scale=scale, names=classes, text_size=text_size).save(path)
    return bool(drawn)
