"""Each model's speed, measured for a moment on this machine: for a study's axis of time, and for what it will cost."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from d_emo.config import TABLE_STEPS, StudySettings, TrainSettings, read_sampler
from d_emo.device import best_device, seconds_of
from d_emo.errors import InputError
from d_emo.files import digest, locked, read_json, remove_left, write_json
from d_emo.io.card import describe_hardware
from d_emo.lab.study.plan import PlannedRun, fid_settings, latent_shape_of
from d_emo.lab.study.results import REMAKE, RESUME
from d_emo.models import create_model
from d_emo.models.contract import DenoiserFrame
from d_emo.models.counting import count_macs, count_parameters
from d_emo.models.layers import fold_batch_norms
from d_emo.models.registry import frame_of, model_kind
from d_emo.sampling.schedulers import steps_for
from d_emo.tables import OBJECTIVES, load
from d_emo.text import markdown_table
from d_emo.threads import use_threads
from d_emo.training.optimizer import make_optimizer
from d_emo.training.parallel import micro_batch_of, precision_of

WARM, TIMED, ROUNDS = 2, 5, 20  # repetitions of a piece of work, and turns of all models
HEAD = ("run", "parameters", "MACs", "ms/step", "hours of training", "hours of measuring", "seeds")


def cost_table(settings: StudySettings, runs: Sequence[PlannedRun]) -> str:
    """Time of every model's training and measuring, as a table.

    Each of the launcher's processes takes its part of the batch at the speed measured on this device; exchanging
    gradients, reading data and decoding drawings are not counted.
    """
    device, processes, seeds = best_device(), processes_of(settings.launch), len(settings.seeds)
    lines, total = [], 0.0
    for run in runs[: len(settings.runs)]:  # the first seed's
        if run.norm_buffers != "trained":
            continue
        training, shape = run.training, latent_shape_of(settings, run.training)
        parameters, macs = size_of(training, shape)
        work = Workload(training, shape, device, processes)
        step, image = (median([measured() for _ in range(WARM + TIMED)][WARM:]) for measured in (work.step, work.draw))
        images = settings.num_images * -(-training.max_steps // training.snapshot_every) / processes
        hours = [step * training.max_steps / 3600, image * images * network_calls(settings, training) / 3600]
        total += seeds * sum(hours)
        lines.append([run.name, f"{parameters / 1e6:.2f}M", f"{macs / 1e6:,.0f}M", f"{1000 * step:,.0f}",
                      *(f"{each:,.2f}" for each in hours), str(seeds)])  # fmt: skip
        print(" | ".join(lines[-1]), flush=True)
    return (
        f"\n{markdown_table(HEAD, lines)}\n\n{total:,.1f} hours on {processes} x {describe_hardware(device)}, as far "
        "as counted: no exchange of gradients, no reading of data, no decoding."
    )


def read_step_times(settings: StudySettings, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """How long a step of each of this study's models takes, timed together and once: "hardware" and "seconds"."""
    keys, folder = "\n".join(sorted({speed_key(run, settings) for run in runs})), Path(settings.output_dir)
    path = folder / f"step_times-{digest(keys)[:8]}.json"
    with locked(folder, wait=True):
        if not path.exists():
            remove_left(path)
            print("timing a training step of every model, in turns", flush=True)
            seconds = step_times(settings, runs)
            write_json(path, {"hardware": describe_hardware(best_device()), "seconds": seconds}, RESUME)
    return read_json(path, lambda kept: {
        "hardware": kept["hardware"], "seconds": {key: kept["seconds"][key] for key in keys.splitlines()}
    }, REMAKE)  # fmt: skip


def step_times(settings: StudySettings, runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Seconds of an optimizer step by `speed_key`: medians of single steps of all models in turns, to and fro.

    What disturbs the machine then disturbs all of them alike.
    """
    device, processes = best_device(), processes_of(settings.launch)
    different = {speed_key(run, settings): run.training for run in runs}
    works = {key: Workload(training, latent_shape_of(settings, training), device, processes)
             for key, training in different.items()}  # fmt: skip
    seconds: dict[str, list[float]] = {key: [] for key in works}
    for turn in range(WARM + ROUNDS):
        for key in list(works)[:: -1 if turn % 2 else 1]:
            seconds[key].append(works[key].step())
    return {key: median(values[WARM:]) for key, values in seconds.items()}


def speed_key(run: PlannedRun, settings: StudySettings) -> str:
    """What decides a run's speed, in words."""
    names = (
        "model", "model_options", "objective", "optimizer", "batch_size", "micro_batch_size", "mixed_precision",
        "compile",
    )  # fmt: skip
    values = {name: getattr(run.training, name) for name in names}
    return json.dumps([values, latent_shape_of(settings, run.training), settings.launch], sort_keys=True)


def processes_of(launch: Sequence[str]) -> int:
    """How many processes the arguments of accelerate launch ask for; 1 if they do not say."""
    words = [word for part in launch for word in part.split("=")]
    return int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1


def network_calls(settings: StudySettings, training: TrainSettings) -> int:
    """Forward passes of one image of a measurement."""
    steps, guidance = read_sampler(settings.samplers[training.objective])[1], settings.guidance_scale
    if settings.reference is not None:
        fid = fid_settings(settings)
        steps, guidance = steps_for(training.objective, fid.steps, TABLE_STEPS), fid.guidance_scale
    return steps * (1 if guidance == 1 else 2)


def size_of(training: TrainSettings, latent_shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters (with a label table for 1000 classes) and multiply-accumulates of a run's model, for one latent."""
    with torch.device("meta"):
        model = new_model(training, latent_shape)
        return count_parameters(model), count_macs(model)


def new_model(training: TrainSettings, latent_shape: tuple[int, ...]) -> DenoiserFrame:
    """A run's model before its training, for 1000 classes; InputError for a classifier."""
    frame = frame_of(training.model)
    if frame is None:
        raise InputError(f"{training.model} is a {model_kind(training.model)}; a study compares denoisers")
    return create_model(training.model, **frame.settings_for(latent_shape, 1000) | (training.model_options or {}))


class Workload:
    """One model's training and drawing of made-up latents (channels, height, width), on one process of so many."""

    def __init__(self, training: TrainSettings, latent_shape: tuple[int, ...], device: torch.device, processes: int):
        per_rank = training.batch_size // processes
        micro = micro_batch_of(training, per_rank, device)
        use_threads(device, processes)
        self.model, self.device = new_model(training, latent_shape).to(device), device
        self.micro_batches = per_rank // micro
        loss = load(OBJECTIVES[training.objective].loss)
        self.objective = loss(null_class=self.model.null_class, learn_sigma=self.model.predicts_variance).to(device)
        self.optimizer = make_optimizer(self.model, training, {}, device)
        self.latents = torch.randn(micro, *latent_shape, device=device)
        self.labels = torch.zeros(micro, dtype=torch.long, device=device)
        self.noise = self.objective.draw(torch.Generator(device).manual_seed(0), micro, latent_shape)
        if training.compile:
            self.model.compile()
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision_of(training, device))

    def step(self) -> float:
        """Seconds of an optimizer step; one micro-batch is done for all."""

        def backward() -> None:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.objective(self.model, self.latents, self.labels, self.noise)["loss"]
            loss.backward()

        def update() -> None:
            self.optimizer.step()
            self.optimizer.zero_grad()

        return seconds_of(backward, self.device) * self.micro_batches + seconds_of(update, self.device)

    @torch.no_grad()
    def draw(self) -> float:
        """Seconds of a forward pass of one image; the model cannot be trained any more."""
        model, inputs = fold_batch_norms(self.model.eval()), (self.latents, self.noise.timesteps, self.labels)
        return seconds_of(lambda: model(*inputs), self.device) / len(self.latents)
