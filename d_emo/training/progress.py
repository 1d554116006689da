"""What a user sees of a run: the progress bar, the tracker's curves and pictures, and early warnings."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from d_emo.config import RunSettings
from d_emo.errors import imported, said

LONG_STEP = 5
"""Seconds of a step from which on the bar shows its micro-batches."""
LONG_RUN = 3
"""Days from which on a run is warned of."""
SLOW = 4
"""A step that takes so many times the seconds of the fastest one is remarked on."""


def warn_of_days(seconds: float, steps: int, smaller: str) -> list[str]:
    """A sentence where so many ``steps`` of so many ``seconds`` take days; ``smaller`` says what to try instead."""
    days = seconds * steps / 86400
    return [] if days <= LONG_RUN else [
        f"At {seconds:.1f} s a step, the {steps:,} steps of this run would take about {days:,.0f} days on this "
        f"machine. {smaller}"
    ]  # fmt: skip


def means(sums: dict[str, float]) -> dict[str, float]:
    """Sums over images as means; "count" is the number of images."""
    return {name: total / sums["count"] for name, total in sums.items() if name != "count"}


class Progress:
    """Reports a run; only the main process speaks.

    Args:
        accelerator: Owner of the trackers.
        settings: ``tracker``, ``log_every``, ``max_steps`` and what else a tracker should keep.

    Raises:
        InputError: The tracker asked for is not installed, or is broken.
    """

    def __init__(self, accelerator: Accelerator, settings: RunSettings):
        self.accelerator, self.settings = accelerator, settings
        self.bar: tqdm | None = None
        self.micro_batches_seen, self.fastest, self.slow_seen = 0, float("inf"), False
        if settings.tracker == "wandb":
            imported("wandb", "`tracker` wandb needs Weights & Biases", "wandb")

    def say(self, text: str) -> None:
        """Print a line, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(said(text))

    @contextmanager
    def following(self, step: int, smaller: str) -> Iterator[None]:
        """Show the bar and keep the trackers open while the run goes on from ``step``."""
        folder = Path(self.settings.output_dir)
        if self.settings.tracker == "wandb":
            options = {"wandb": {"dir": str(folder), "name": folder.name}}
            self.accelerator.init_trackers("d-emo", config=asdict(self.settings), init_kwargs=options)
        else:
            self.accelerator.init_trackers("logs")  # the folder's name
        self.smaller = smaller
        self.bar = tqdm(total=self.settings.max_steps, initial=step, unit="step", desc="training", dynamic_ncols=True,
                        disable=not self.accelerator.is_main_process)
        try:
            yield
        finally:
            self.bar.close()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Let the bar say what else is done between two steps."""
        self.bar.set_description(what)
        try:
            yield
        finally:
            self.bar.set_description("training")

    def micro_batch_took(self, seconds: float, number: int, micro_batches: int) -> None:
        """Show where in a long step the run is.

        After the second micro-batch (the first one pays for warming up), warn if the run would take days.
        """
        self.micro_batches_seen += 1
        if seconds * micro_batches > LONG_STEP and micro_batches > 1:
            self.bar.set_description(f"micro-batch {number}/{micro_batches}" if number < micro_batches else "training")
        if self.micro_batches_seen == 2:
            for warning in warn_of_days(seconds * micro_batches, self.settings.max_steps, self.smaller):
                self.say(warning)

    def step_done(self, step: int, figures: dict[str, float]) -> None:
        """Move the bar; log every ``log_every`` steps."""
        self.bar.update()
        speed = figures["images_per_second"]
        self._mind_slow_steps(step, self.settings.batch_size / speed)
        self.bar.set_postfix(loss=f"{figures['loss']:.4f}", images_per_s=f"{speed:.1f}", refresh=False)
        if step % self.settings.log_every == 0 or step == self.settings.max_steps:
            self.accelerator.log({**figures, "memory_gib": peak_memory(self.accelerator.device)}, step=step)

    def _mind_slow_steps(self, step: int, seconds: float) -> None:
        """Say once what to try where a step on a CPU takes several times as long as the fastest before it."""
        usual, self.fastest = self.fastest, min(self.fastest, seconds)
        if self.accelerator.device.type == "cpu" and seconds > max(SLOW * usual, 1) and not self.slow_seen:
            self.slow_seen = True
            self.say(f"step {step} took {seconds:.1f} s, {seconds / usual:.0f} times as long as others: does another "
                     "program use the CPUs? Ctrl-C, then the same command with OMP_WAIT_POLICY=passive before it, goes "
                     "on with threads that give way while they wait")

    def validated(self, step: int, figures: dict[str, float]) -> None:
        """Print and log what the held-out data gave."""
        self.accelerator.log(figures, step=step)
        self.say(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in figures.items()))

    def picture(self, step: int, path: Path) -> None:
        """Hand a sample grid to the tracker."""
        pixels = np.asarray(Image.open(path).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **layout)


def peak_memory(device: torch.device) -> float:
    """Most memory ever in use, in GiB: the GPU's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
