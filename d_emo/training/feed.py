"""What the steps of a run compute on: micro-batches of the data set, and the randomness of each step."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from d_emo.data import StepSampler, rows_of
from d_emo.threads import loader_workers
from d_emo.training.stop import ignore_interrupts


class Feed:
    """Serves the steps in order; both data and randomness depend on (seed, step) alone.

    Where the device computes on its own (not a CPU), a step's first micro-batch and its draws can be made while the
    step before it is still being computed.

    Args:
        dataset: What is read, by index; its ``collate``, if it has one, makes a batch of what is read.
        draw: All randomness of a step: (generator, global batch size) -> tensors that have a row for each image, alone
            or in tuples and the like.
        seed: Of the run.
        batch_size: Images of a step, those of all processes.
        micro_batch_size: Images of a process that go through the network at once.
        device: Where micro-batches and draws go.
        step: The first step to serve.
        rank, world_size: This process, of how many.
        num_workers: Processes that read; None: see `loader_workers`.

    Attributes:
        waited: Seconds spent waiting for data, ever.
    """

    def __init__(
        self, dataset: Dataset, draw: Callable[[torch.Generator, int], Any], *, seed: int, batch_size: int,
        micro_batch_size: int, device: torch.device, step: int = 0, rank: int = 0, world_size: int = 1,
        num_workers: int | None = None,
    ):
        self.draw, self.seed, self.batch_size, self.micro_batch_size = draw, seed, batch_size, micro_batch_size
        self.device, self.rank, self.share = device, rank, batch_size // world_size
        self.sampler = StepSampler(
            len(dataset), batch_size, micro_batch_size, seed=seed, start_step=step, rank=rank, world_size=world_size
        )
        workers = loader_workers(num_workers, device, world_size)
        self._batches = iter(DataLoader(
            dataset, batch_sampler=self.sampler, num_workers=workers, worker_init_fn=ignore_interrupts,
            pin_memory=device.type == "cuda", persistent_workers=workers > 0,
            collate_fn=getattr(dataset, "collate", None),
        ))  # fmt: skip
        self.waited, self.ahead = 0.0, device.type != "cpu"
        self._ready: tuple[list[torch.Tensor], Any] | None = None

    def step(self, step: int) -> Iterator[tuple[list[torch.Tensor], Any]]:
        """The micro-batches of this process, each with its rows of the step's draws.

        Shape: images, or moments of latents, (B, C, H, W) and labels (B,), where B is ``micro_batch_size``; or what the
            data set's ``collate`` makes.
        """
        batch, draws = self._ready or self._start(step)
        self._ready = None
        torch.manual_seed((self._seed_of(step) + self.rank) % 2**63)  # for drop path and the like
        first = self.rank * self.share
        for row in range(first, first + self.share, self.micro_batch_size):
            yield batch if row == first else self._next(), rows_of(draws, slice(row, row + self.micro_batch_size))

    def prepare(self, step: int) -> None:
        """Start on the step to be served next, while the device is busy."""
        if self.ahead:
            self._ready = self._start(step)

    def _start(self, step: int) -> tuple[list[torch.Tensor], Any]:
        generator = torch.Generator(self.device).manual_seed(self._seed_of(step))
        return self._next(), self.draw(generator, self.batch_size)

    def _seed_of(self, step: int) -> int:
        return int(np.random.SeedSequence([self.seed, step]).generate_state(1, np.uint64)[0]) >> 1

    def _next(self) -> list[torch.Tensor]:
        asked = time.perf_counter()
        batch = tree_map(lambda part: part.to(self.device, non_blocking=True), next(self._batches))
        self.waited += time.perf_counter() - asked
        return batch
