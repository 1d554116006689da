"""A training step as a run makes it, beside its bare form: what data, average, guard, curves and bar cost."""

import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time

import torch
from torch import nn

from d_emo.config import StepSettings, TrainSettings
from d_emo.data import open_dataset
from d_emo.device import best_device, synchronize
from d_emo.errors import InputError
from d_emo.lab.benchmark.timing import Case
from d_emo.latents import default_codec, encode, load_codec
from d_emo.models.registry import model_kind
from d_emo.objective import StepNoise
from d_emo.training import fit
from d_emo.training.denoiser import DenoiserTask
from d_emo.training.optimizer import make_optimizer


class _Measured(Exception):
    """All rounds are done, so the run is of no more use."""


class _InTurns(DenoiserTask):
    """A denoiser's task that times ``steps`` steps of the run in a row, then as many bare ones, over and over.

    The bare step has a network and an optimizer of its own, and one batch that lies on the device.
    """

    def __init__(self, train: TrainSettings, *, steps: int, rounds: int, clock: str):
        super().__init__(train)
        self.now = perf_counter if clock == "wall" else process_time
        self.steps, self.left, self.seen = steps, rounds + 1, 0  # the first round warms up
        self.bare_model = copy.deepcopy(self.model)
        self.run, self.bare = (Case("a training step", name, lambda: None) for name in ("as a run makes it", "bare"))

    def loss(self, model: nn.Module, batch: Sequence[torch.Tensor], step: StepNoise) -> dict[str, torch.Tensor]:
        device = step.noise.device
        if self.seen == 0:
            self._make_bare(batch, step, device)
        if self.seen % self.steps == 0:
            synchronize(device)
            if self.seen:
                self.run.seconds.append((self.now() - self.began) / self.steps)
                self._time_bare(device)
            self.began = self.now()
        self.seen += 1
        return super().loss(model, batch, step)

    def _make_bare(self, batch: Sequence[torch.Tensor], step: StepNoise, device: torch.device) -> None:
        model = self.bare_model.to(device)
        optimizer = make_optimizer(model, self.settings, self.lr_scales, device)
        if self.settings.compile:
            model.compile()
        if self.settings.mixed_precision == "bf16":
            model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)

        def bare() -> None:
            super(_InTurns, self).loss(model, batch, step)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        self.bare.run = bare

    def _time_bare(self, device: torch.device) -> None:
        start = self.now()
        for _ in range(self.steps):
            self.bare.run()
        synchronize(device)
        self.bare.seconds.append((self.now() - start) / self.steps)
        self.left -= 1
        if not self.left:
            for case in (self.run, self.bare):
                del case.seconds[0]
            raise _Measured


def step_table(settings: StepSettings) -> str:
    """A markdown table: milliseconds of a bare training step, and of the same step in a run from encoded latents.

    Raises:
        InputError: The network or the image size cannot be used.
    """
    if (kind := model_kind(settings.model)) != "denoiser":
        raise InputError(f"`model` {settings.model} is a {kind}; name a denoiser")
    device, batch = best_device(), settings.batch_size
    with TemporaryDirectory(prefix="d-emo-step-") as folder:
        latents = Path(folder) / "latents"
        images = open_dataset(
            dataset="shapes", data_dir=None, image_size=settings.image_size, num_images=max(4 * batch, 64)
        )
        encode(images, load_codec(default_codec(None)).to(device), latents, device=device)
        task = _InTurns(TrainSettings(
            model=settings.model, model_options={"depth": settings.depth} if settings.depth else None,
            latents=str(latents), output_dir=str(Path(folder) / "run"), batch_size=batch, micro_batch_size=batch,
            mixed_precision="bf16" if settings.dtype == "bfloat16" else "no", compile=settings.compile,
        ), steps=settings.steps, rounds=settings.rounds, clock=settings.clock)  # fmt: skip
        try:
            fit(task, task.settings)
        except _Measured:
            pass
    lines = [f"| {settings.model}, {settings.image_size} px, batch {batch}, {settings.dtype} | ms | over bare |",
             "|---|---:|---:|"]  # fmt: skip
    for case in (task.bare, task.run):
        lines.append(f"| {case.name} | {1e3 * case.median:.1f} | {case.median / task.bare.median:.3f} |")
    return "\n".join(lines)
