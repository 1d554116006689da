"""A run in small, before it: a few images through network, loss and optimizer, of which nothing is kept."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d_emo.device import best_device
from d_emo.ema import EMA
from d_emo.threads import use_threads
from d_emo.training.feed import Feed
from d_emo.training.optimizer import make_optimizer
from d_emo.training.parallel import micro_batch_of, precision_of
from d_emo.training.progress import peak_memory
from d_emo.training.task import Task

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Rehearsal(NamedTuple):
    """What was seen of a run; by one process, not compiled.

    Attributes:
        batch, draws: A micro-batch as the data set gives it, and its rows of the step's randomness.
        seconds: Of a whole step, by its second micro-batch and the optimizer's update.
        gib: Most memory that was in use.
    """

    batch: list[Any]
    draws: Any
    seconds: float
    gib: float


def rehearse(task: Task) -> Rehearsal:
    """Take two micro-batches through a task whose data set is not to be encoded first; its model is changed."""
    device, settings = best_device(), task.settings
    use_threads(device, 1)
    micro, precision = micro_batch_of(settings, settings.batch_size, device), precision_of(settings, device)
    task.prepare(device, Path(settings.output_dir))
    model = task.model.to(device).train()
    average = EMA(model, settings.ema_decay)
    optimizer = make_optimizer(model, settings, task.lr_scales, device)
    feed = Feed(task.dataset, task.draw, seed=settings.seed, batch_size=micro, micro_batch_size=micro, device=device,
                num_workers=settings.num_workers)
    for step in range(2):  # the first one pays for warming up
        began = _now(device)
        ((batch, draws),) = feed.step(step)
        with torch.autocast(device.type, TYPES.get(precision), enabled=precision in TYPES):
            loss = task.loss(model, batch, draws)["loss"]
        loss.backward()
        computed = _now(device)
        optimizer.step()
        average.update(model)
    seconds = (computed - began) * settings.batch_size / micro + _now(device) - computed
    return Rehearsal(batch, draws, seconds, peak_memory(device))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
