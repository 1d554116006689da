"""Each model's speed, measured for a moment on this machine: for a study's axis of time, and for what it will cost."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

import torch

from d_emo.card import describe_hardware
from d_emo.config import StudySettings, TrainSettings
from d_emo.data.cores import use_cores
from d_emo.models import create_model
from d_emo.models.layers import fold_batch_norms
from d_emo.objective import OBJECTIVES
from d_emo.study.plan import PlannedRun, latent_shape_of
from d_emo.study.results import size_of
from d_emo.training.optimizer import make_optimizer

WARM, TIMED, ROUNDS = 2, 5, 5  # repetitions of a piece of work, and turns of all models


def cost_table(settings: StudySettings, runs: Sequence[PlannedRun]) -> str:
    """Time of every model's training and measuring, as a table.

    Each of the launcher's processes takes its share of the batch at the speed measured on this device; exchanging
    gradients, reading data and decoding drawings are not counted.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processes = processes_of(settings.launch)
    lines = [
        "| run | parameters | MACs | ms/step | hours of training | hours of measuring | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    total = 0.0
    for run in runs:
        if run.seed != settings.seeds[0] or run.norm_buffers != "trained":
            continue
        shape = latent_shape_of(settings, run.training)
        parameters, macs = size_of(run, shape)
        step, image = measure_speed(run.training, shape, device, processes)
        training = step * run.training.max_steps / 3600
        snapshots = -(-run.training.max_steps // run.training.snapshot_every)
        measuring = image * settings.num_images * network_calls(settings, run.training) * snapshots / processes / 3600
        total += len(settings.seeds) * (training + measuring)
        lines.append(
            f"| {run.name} | {parameters / 1e6:.2f}M | {macs / 1e6:,.0f}M | {1000 * step:,.0f} | {training:,.2f} "
            f"| {measuring:,.2f} | {len(settings.seeds)} |"
        )
        print(lines[-1], flush=True)
    return "\n".join([
        "", *lines, "",
        f"{total:,.1f} hours on {processes} x {describe_hardware(device)}, as far as counted: no exchange of "
        "gradients, no reading of data, no decoding.",
    ])  # fmt: skip


def step_times(settings: StudySettings, runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Seconds of an optimizer step by `speed_key`: medians of all runs in turns, to and fro, as disturbances may be."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    different = {speed_key(run, settings): run for run in runs}
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(ROUNDS):
        for key, run in list(different.items())[:: -1 if turn % 2 else 1]:
            shape = latent_shape_of(settings, run.training)
            seconds[key].append(measure_speed(run.training, shape, device, processes_of(settings.launch))[0])
    return {key: median(values) for key, values in seconds.items()}


def speed_key(run: PlannedRun, settings: StudySettings) -> str:
    """What decides a run's speed, in words."""
    names = ("model", "model_options", "objective", "batch_size", "micro_batch_size", "mixed_precision", "compile")
    values = {name: getattr(run.training, name) for name in names}
    return json.dumps([values, latent_shape_of(settings, run.training), settings.launch], sort_keys=True)


def processes_of(launch: Sequence[str]) -> int:
    """How many processes the arguments of accelerate launch ask for; 1 if they do not say."""
    words = [word for part in launch for word in part.split("=")]
    return int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1


def network_calls(settings: StudySettings, training: TrainSettings) -> int:
    """Forward passes of one image of a measurement."""
    if settings.reference is None:
        steps, guided = int(settings.samplers[training.objective].rpartition(":")[2]), settings.guidance_scale != 1
    else:
        options = settings.fid or {}
        steps, guided = options.get("steps", 250), options.get("guidance_scale", 1) != 1
    return steps * (2 if guided else 1)


def measure_speed(
    training: TrainSettings, latent_shape: tuple[int, int, int], device: torch.device, processes: int
) -> tuple[float, float]:
    """Seconds of one optimizer step, and of drawing one image's forward pass, on one process of so many."""
    share = training.batch_size // processes
    micro = min(training.micro_batch_size or (share if device.type == "cuda" else 8), share)
    use_cores(device, processes)
    channels, side, _ = latent_shape
    options = {"sample_size": side, "in_channels": channels} | (training.model_options or {})
    model = create_model(training.model, **options).to(device)
    objective = OBJECTIVES[training.objective](null_class=model.null_class).to(device)
    optimizer = make_optimizer(model, training, {}, device)
    latents = torch.randn(micro, *latent_shape, device=device)
    labels = torch.zeros(micro, dtype=torch.long, device=device)
    draws = objective.draw(torch.Generator(device).manual_seed(0), micro, latent_shape)
    if training.compile:
        model.compile()
    autocast = precision(training, device)

    def step() -> None:
        with autocast():
            loss = objective(model, latents, labels, draws)["loss"]
        loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, device) * (share // micro) + timed(update, device)
    fold_batch_norms(model.eval())
    with torch.no_grad():
        drawing = timed(lambda: model(latents, timestep=draws.timesteps, class_labels=labels), device) / micro
    return seconds, drawing


def precision(training: TrainSettings, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """The autocast of a training run, as the training loop chooses it."""
    on_gpu = device.type == "cuda"
    chosen = training.mixed_precision or ("bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a piece of work, after some repetitions to warm up."""
    seconds = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[WARM:])[TIMED // 2]
