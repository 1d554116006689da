"""Each model's speed, measured for a moment on this machine: for a study's axis of time, and for what it will cost."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median

import torch

from d_emo.config import StudySettings, TrainSettings
from d_emo.io.card import describe_hardware
from d_emo.lab.study.plan import PlannedRun, latent_shape_of
from d_emo.lab.study.results import size_of
from d_emo.models import create_model
from d_emo.models.layers import fold_batch_norms
from d_emo.tables import OBJECTIVES, load
from d_emo.threads import use_threads
from d_emo.training.optimizer import make_optimizer

WARM, TIMED, ROUNDS = 2, 5, 20  # repetitions of a piece of work, and turns of all models


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
        work = Workload(run.training, shape, device, processes)
        step, image = settled(work.step), settled(work.draw)
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
    """Seconds of an optimizer step by `speed_key`: medians of single steps of all models in turns, to and fro.

    What disturbs the machine then disturbs all of them alike.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    different = {speed_key(run, settings): run.training for run in runs}
    works = {
        key: Workload(training, latent_shape_of(settings, training), device, processes_of(settings.launch))
        for key, training in different.items()
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(WARM + ROUNDS):
        for key in list(works)[:: -1 if turn % 2 else 1]:
            seconds[key].append(works[key].step())
    return {key: median(values[WARM:]) for key, values in seconds.items()}


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


class Workload:
    """One model's training and drawing, on one process of so many, on made-up latents.

    Args:
        training: Settings of the run.
        latent_shape: Channels, height and width.
        device: Where.
        processes: That share the batch.
    """

    def __init__(
        self, training: TrainSettings, latent_shape: tuple[int, int, int], device: torch.device, processes: int
    ):
        share = training.batch_size // processes
        micro = min(training.micro_batch_size or (share if device.type == "cuda" else 8), share)
        use_threads(device, processes)
        channels, side, _ = latent_shape
        options = {"sample_size": side, "in_channels": channels} | (training.model_options or {})
        self.model, self.device, self.parts = create_model(training.model, **options).to(device), device, share // micro
        self.objective = load(OBJECTIVES[training.objective].loss)(null_class=self.model.null_class).to(device)
        self.optimizer = make_optimizer(self.model, training, {}, device)
        self.latents = torch.randn(micro, *latent_shape, device=device)
        self.labels = torch.zeros(micro, dtype=torch.long, device=device)
        self.draws = self.objective.draw(torch.Generator(device).manual_seed(0), micro, latent_shape)
        if training.compile:
            self.model.compile()
        self.autocast = precision(training, device)

    def step(self) -> float:
        """Seconds of an optimizer step; one part of the batch is done for all."""
        return self._seconds(self._backward) * self.parts + self._seconds(self._update)

    def draw(self) -> float:
        """Seconds of a forward pass of one image; the model cannot be trained any more."""
        fold_batch_norms(self.model.eval())
        return self._seconds(self._forward) / len(self.latents)

    def _backward(self) -> None:
        with self.autocast():
            loss = self.objective(self.model, self.latents, self.labels, self.draws)["loss"]
        loss.backward()

    def _update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _forward(self) -> None:
        self.model(self.latents, timestep=self.draws.timesteps, class_labels=self.labels)

    def _seconds(self, work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def settled(measured: Callable[[], float]) -> float:
    """Median of some measurements, after some to warm up."""
    return median([measured() for _ in range(WARM + TIMED)][WARM:])


def precision(training: TrainSettings, device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """The autocast of a training run, as the training loop chooses it."""
    on_gpu = device.type == "cuda"
    chosen = training.mixed_precision or ("bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(chosen)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
