"""The training loop, the same for every kind of model, and the only user of accelerate."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from d_emo import checkpoint
from d_emo.config import InputError, RunSettings, write_yaml
from d_emo.data import StepSampler
from d_emo.ema import EMA

# Settings that a resumed run may change without becoming another run.
_FREE_ON_RESUME = {
    "output_dir", "max_steps", "resume", "compile", "num_workers", "log_every", "snapshot_every", "state_every",
    "mixed_precision", "micro_batch_size", "preview_guidance", "gradient_checkpointing", "data_dir", "skip_corrupt",
    "push_to_hub",
}


class Task(Protocol):
    """What a training run needs to know of its model and data."""

    model: nn.Module
    dataset: Dataset
    smaller: str  # a configuration to try where this one would take too long
    lr_scales: dict[str, float]  # by parameter name, where the learning rate is not that of the rest

    def introduction(self) -> list[str]:
        """Lines that tell the user what is about to be trained on what."""

    def prepare(self, device: torch.device, folder: Path) -> None:
        """Move helpers to the device, build caches under ``folder``; may replace ``dataset``."""

    def draw(self, generator: torch.Generator, batch_size: int) -> Any:
        """All randomness of one step for the global batch; slices give a process its share."""

    def loss(self, model: nn.Module, batch: Any, draws: Any) -> dict[str, torch.Tensor]:
        """Scalars of a micro-batch, under "loss" the one to minimise."""

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        """Write the averaged model."""


def fit(
    task: Task, settings: RunSettings, *, preview: Callable[[Path, nn.Module], None] | None = None
) -> Path | None:
    """Train until ``settings.max_steps``, or until SIGINT or SIGTERM; the same command goes on from there.

    Args:
        task: Model, data and loss.
        settings: Resolved settings; written to ``config.yaml`` in the run folder.
        preview: Called with (png path, averaged model) at every snapshot.

    Returns:
        The last snapshot's folder on the main process, None on the others.

    Raises:
        InputError: Settings that cannot work together, an unwritable run folder, an unusable state.
        FloatingPointError: The loss is no longer finite.
        SystemExit: After a signal: code 0 for SIGINT, 143 for SIGTERM; the state is saved.
    """
    return _Run(task, settings, preview).go()


class _Run:
    """One run on one process."""

    def __init__(self, task: Task, settings: RunSettings, preview: Callable[[Path, nn.Module], None] | None):
        self.task, self.settings, self.preview = task, settings, preview
        self.folder = Path(settings.output_dir)
        on_gpu = torch.cuda.is_available()
        precision = settings.mixed_precision or ("bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no")
        world = int(os.environ.get("WORLD_SIZE", 1))
        per_rank, rest = divmod(settings.batch_size, world)
        if rest:
            raise InputError(f"--batch-size {settings.batch_size} (global) cannot be divided by {world} processes")
        self.micro = min(settings.micro_batch_size or (per_rank if on_gpu else 32), per_rank)
        if per_rank % self.micro:
            raise InputError(
                f"--micro-batch-size {self.micro} does not divide the {per_rank} images per process and step"
            )
        self.accelerator = Accelerator(
            mixed_precision=precision, log_with="tensorboard", project_dir=self.folder,
            gradient_accumulation_steps=per_rank // self.micro,
        )
        if self.accelerator.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))  # the launcher sets one, unasked
        if self.accelerator.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.per_rank, self.step, self.minutes = per_rank, 0, 0.0

    # -- set-up --

    def go(self) -> Path | None:
        state = self._open_run_folder()
        task, accelerator, settings = self.task, self.accelerator, self.settings
        set_seed(settings.seed)
        for line in task.introduction():
            self._say(line)
        with accelerator.local_main_process_first():
            task.prepare(accelerator.device, self.folder)
        model = task.model.to(accelerator.device)
        self.ema = EMA(model, settings.ema_decay, warmup=settings.ema_warmup)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, settings.weight_decay, task.lr_scales), lr=settings.learning_rate,
            fused=accelerator.device.type == "cuda",
        )
        if settings.compile:
            model.compile()
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        if state is not None:
            self._restore(state)
            self._say(f"resuming at step {self.step} of {settings.max_steps}")
        if accelerator.is_main_process:
            write_yaml(settings, self.folder / "config.yaml")
        accelerator.init_trackers("logs")
        with _signals() as received:
            self._loop(received)
        accelerator.end_training()
        return self._snapshot_folder() if accelerator.is_main_process else None

    def _open_run_folder(self) -> dict[str, Any] | None:
        """Make or check the run folder; return the state to go on from."""
        settings, states = self.settings, self.folder / "states"
        try:
            states.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write to the run folder {self.folder}: {error.strerror}") from None
        if not os.access(self.folder, os.W_OK):
            raise InputError(f"cannot write to the run folder {self.folder}: permission denied")
        if settings.resume == "never":
            if any(states.iterdir()):
                raise InputError(f"{self.folder} already holds a run; use --resume auto or another --output-dir")
            return None
        found = checkpoint.find_state(states) if settings.resume == "auto" else Path(settings.resume)
        if found is None:
            return None
        self._check_same_run(self.folder / "config.yaml")
        return checkpoint.load_state(found)

    def _check_same_run(self, config: Path) -> None:
        if not config.exists():
            return
        old, new = yaml.safe_load(config.read_text()), vars(self.settings)
        changed = [f"{key} was {old[key]}, now {new[key]}" for key in old
                   if key in new and key not in _FREE_ON_RESUME and old[key] != new[key]]
        if changed:
            raise InputError(
                f"the run in {self.folder} had other settings ({'; '.join(changed)}); "
                "repeat the same command to go on, or choose another --output-dir"
            )

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.accelerator.scaler is not None and state["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.minutes = state["step"], state["minutes"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"the training state does not fit this model: {' '.join(str(error).split())}") from None

    # -- the loop --

    def _loop(self, received: list[int]) -> None:
        settings, accelerator = self.settings, self.accelerator
        batches = self._batches()
        bar = tqdm(total=settings.max_steps, initial=self.step, unit="step", disable=not accelerator.is_main_process,
                   desc="training", dynamic_ncols=True)
        forecast = _Forecast(settings, accelerator.gradient_accumulation_steps, self.task.smaller, say=self._say)
        self.started = time.time()
        while self.step < settings.max_steps:
            began = time.perf_counter()
            losses = self._train_step(batches, forecast)
            speed = settings.batch_size / (time.perf_counter() - began)
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{losses['loss']:.4f}", images_per_s=f"{speed:.1f}", refresh=False)
            if self.step % settings.log_every == 0 or self.step == settings.max_steps:
                rates = {"images_per_second": speed, "learning_rate": self._learning_rate()}
                accelerator.log({**losses, **rates}, step=self.step)
            last = self.step == settings.max_steps
            stop = self._agree_to_stop(received)
            if last or self.step % settings.snapshot_every == 0:
                self._save_snapshot()
            if last or stop or self.step % settings.state_every == 0:
                self._save_state()
            if stop and not last:
                bar.close()
                self._say(f"stopped by a signal at step {self.step}; the state is saved, the same command goes on")
                accelerator.end_training()
                sys.exit(143 if stop == signal.SIGTERM else 0)
        bar.close()
        if not self._snapshot_folder().exists():  # a run resumed after its last step, its snapshot removed
            self._save_snapshot()

    def _train_step(self, batches: Iterator, forecast: _Forecast) -> dict[str, float]:
        task, accelerator = self.task, self.accelerator
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate() * group["lr_scale"]
        seed = int(np.random.SeedSequence([self.settings.seed, self.step]).generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator(accelerator.device).manual_seed(seed)
        draws = task.draw(generator, self.settings.batch_size)
        torch.manual_seed(seed % 2**32 + accelerator.process_index)  # for drop path and the like
        start, parts = accelerator.process_index * self.per_rank, []
        for row in range(start, start + self.per_rank, self.micro):
            began = time.perf_counter()
            batch = [part.to(accelerator.device, non_blocking=True) for part in next(batches)]
            with accelerator.accumulate(self.model):
                losses = task.loss(self.model, batch, draws[row : row + self.micro])  # autocast inside the model
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients and self.settings.grad_clip is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
                parts.append({name: value.detach().float() for name, value in losses.items()})
                if accelerator.sync_gradients:
                    means = self._means(parts)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            forecast.micro_batch_took(time.perf_counter() - began)
        self.ema.update(accelerator.unwrap_model(self.model))
        return means

    def _means(self, parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means over micro-batches and processes; stops before the update when the loss is not finite."""
        means = torch.stack([torch.stack(list(part.values())) for part in parts]).mean(dim=0)
        means = dict(zip(parts[0], self.accelerator.reduce(means, "mean").tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.step} (learning rate {self._learning_rate():.2e}); the "
                f"last good state is in {self.folder / 'states'}. Try a lower --learning-rate or --mixed-precision no"
            )
        return means

    def _learning_rate(self) -> float:
        """Learning rate of the coming update, from the step alone."""
        settings = self.settings
        peak = settings.learning_rate
        if self.step < settings.warmup_steps:
            return peak * (self.step + 1) / settings.warmup_steps
        if settings.schedule == "constant":
            return peak
        done = (self.step - settings.warmup_steps) / max(1, settings.max_steps - settings.warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))

    def _batches(self) -> Iterator:
        workers = self.settings.num_workers
        if workers is None:
            on_cpu = self.accelerator.device.type == "cpu"
            workers = 0 if on_cpu else min(8, (os.cpu_count() or 1) // self.accelerator.num_processes)
        sampler = StepSampler(
            len(self.task.dataset), self.settings.batch_size, self.micro, seed=self.settings.seed, start_step=self.step,
            rank=self.accelerator.process_index, world_size=self.accelerator.num_processes,
        )
        return iter(DataLoader(
            self.task.dataset, batch_sampler=sampler, num_workers=workers, worker_init_fn=_ignore_interrupts,
            pin_memory=self.accelerator.device.type == "cuda", persistent_workers=workers > 0,
        ))

    # -- what is saved --

    def _snapshot_folder(self) -> Path:
        return self.folder / "snapshots" / f"step-{self.step}"

    def _save_snapshot(self) -> None:
        if self.accelerator.is_main_process:
            self.task.save_snapshot(self._snapshot_folder(), self.ema.model, step=self.step, minutes=self._minutes())
            if self.preview is not None:
                picture = self.folder / "samples" / f"step-{self.step}.png"
                picture.parent.mkdir(exist_ok=True)
                self.preview(picture, self.ema.model)
        self.accelerator.wait_for_everyone()

    def _save_state(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.save_state(self.folder / "states", self.step, {
                "step": self.step,
                "minutes": self._minutes(),
                "model": self.accelerator.unwrap_model(self.model).state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            })
        self.accelerator.wait_for_everyone()

    def _minutes(self) -> float:
        return self.minutes + (time.time() - self.started) / 60

    def _agree_to_stop(self, received: list[int]) -> int:
        """The signal that any process got, or 0."""
        mine = torch.tensor(max(received, default=0), device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max()) if self.accelerator.num_processes > 1 else int(mine)

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)


class _Forecast:
    """Tells early when a run would take days."""

    def __init__(self, settings: RunSettings, micro_batches: int, smaller: str, *, say: Callable[[str], None]):
        self.settings, self.micro_batches, self.smaller, self.say = settings, micro_batches, smaller, say
        self.seen = 0

    def micro_batch_took(self, seconds: float) -> None:
        self.seen += 1
        if self.seen != 2:  # the first one pays for warming up
            return
        per_step, steps = seconds * self.micro_batches, self.settings.max_steps
        days = per_step * steps / 86400
        if days > 3:
            self.say(
                f"At {per_step:.1f} s a step, the {steps:,} steps of this run would take about {days:,.0f} days on "
                f"this machine. {self.smaller}"
            )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second SIGINT interrupts at once."""
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parameter_groups(model: nn.Module, weight_decay: float, lr_scales: dict[str, float]) -> list[dict[str, Any]]:
    """Decay matrices and kernels, not biases, norms and scales; named parameters may have a learning rate apart."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((decay, lr_scales.get(name, 1.0)), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()]
