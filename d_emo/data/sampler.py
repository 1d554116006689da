"""The order of the data, and rows of a step's draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.data import Sampler

from d_emo.errors import InputError


class EpochIndex(int):
    """An index into a data set that knows the pass over the data that asks for it; augmentation depends on both.

    The image that is taken in place of an unreadable one, ``(index + offset) % length``, knows it too.
    """

    epoch: int

    def __new__(cls, index: int, epoch: int = 0) -> EpochIndex:
        made = super().__new__(cls, index)
        made.epoch = epoch
        return made

    def __add__(self, other: int) -> EpochIndex:
        return EpochIndex(int(self) + other, self.epoch)

    def __mod__(self, other: int) -> EpochIndex:
        return EpochIndex(int(self) % other, self.epoch)


class StepSampler(Sampler[list[int]]):
    """Indices of each micro-batch, from the step alone; so any run can go on at any step, and processes agree.

    The images of global step s are entries s B to (s + 1) B of one endless list: a new permutation of the data set
    for every epoch, from (seed, epoch). Rank r takes the r-th equal share, micro-batch by micro-batch.

    Args:
        length: Length of the data set.
        batch_size: Global batch size B.
        micro_batch_size: Images of a process's micro-batch.
        start_step: First step to serve.
    """

    def __init__(
        self, length: int, batch_size: int, micro_batch_size: int, *, seed: int, start_step: int = 0,
        rank: int = 0, world_size: int = 1,
    ):
        self.length, self.batch_size, self.micro_batch_size = length, batch_size, micro_batch_size
        self.seed, self.start_step = seed, start_step
        self.share = batch_size // world_size
        self.offset = rank * self.share
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            first = step * self.batch_size + self.offset
            for start in range(first, first + self.share, self.micro_batch_size):
                yield [self._index(position) for position in range(start, start + self.micro_batch_size)]
            step += 1

    def indices(self, step: int) -> list[int]:
        """The images of one step, those of all processes."""
        return [self._index(position) for position in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator)
        return EpochIndex(int(self._order[place]), epoch)


def rows_of(draws: Any, rows: slice | torch.Tensor) -> Any:
    """Some rows of each tensor of a step's draws, which keep their form. Shape: (B, ...) each -> (rows, ...).

    Raises:
        InputError: There is something else among them than tensors and None.
    """

    def taken(part: Any) -> Any:
        if part is None:
            return None
        if not isinstance(part, torch.Tensor):
            raise InputError(
                f"a task draws tensors or None, alone or in tuples, lists and dictionaries, not {type(part).__name__}; "
                "a NamedTuple has names too"
            )
        return part[rows]

    return tree_map(taken, draws)
