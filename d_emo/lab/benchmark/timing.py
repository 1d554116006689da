"""Cases that run in turns, so that what disturbs the machine disturbs all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import torch

from d_emo.device import seconds_of


@dataclass
class Case:
    """One network doing one thing.

    Attributes:
        group: what is compared among itself, e.g. "S-2, 256 px, training".
        name: whose network it is.
        run: does the work once.
        macs: multiply-accumulates of the work; 0 if they are not known.
        saved_megabytes: what the forward pass keeps for the backward pass; None in inference.
        peak_megabytes: the most GPU memory in use while it ran, filled in by `measure`; None on a CPU.
        seconds: filled in by `measure`.
    """

    group: str
    name: str
    run: Callable[[], object]
    macs: int = 0
    saved_megabytes: float | None = None
    peak_megabytes: float | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median time of a run, in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        return tuple(np.quantile(self.seconds, (0.25, 0.75)).tolist())


def measure(cases: Sequence[Case], *, rounds: int, device: torch.device, clock: str = "wall") -> None:
    """Run every case once to warm up, then ``rounds`` times each in turns; fills in the cases' measurements."""
    now = time.perf_counter if clock == "wall" else time.process_time
    for number in range(rounds + 1):
        for case in cases:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            seconds = seconds_of(case.run, device, now)
            if device.type == "cuda":
                case.peak_megabytes = torch.cuda.max_memory_allocated(device) / 1e6
            if number:
                case.seconds.append(seconds)


def saved_bytes(forward: Callable[[], object], exclude: Sequence[torch.Tensor] = ()) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, each memory counted once.

    Shape: tensors of any shape.

    Args:
        forward: runs the pass.
        exclude: tensors that are there anyway, such as the parameters.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
