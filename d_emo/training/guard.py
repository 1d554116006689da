"""What happens when a loss or a gradient is not finite: no update is made with it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from d_emo.ema import places
from d_emo.errors import InputError, RunError
from d_emo.files import write_json

_MOST_IN_A_ROW = 10
_MOST_OVERFLOWS_IN_A_ROW = 30  # a gradient scaler halves its factor at each; from 65,536 it takes 16 to reach 1


@contextmanager
def variance_of_one_refused() -> Iterator[None]:
    """A context for a forward pass in which a batch norm may see a single value of each channel.

    Raises:
        InputError: It does.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InputError(
            "a batch norm sees one value of each channel, which has no variance: a map of one pixel, of one image; "
            "raise `batch_size` (and `micro_batch_size`, if it is given) so that a process takes two images at a time"
        ) from None


class NonFiniteGuard:
    """Judges each step before its update; a refused step leaves the model as it was, its buffers included.

    Args:
        model: Running statistics are among its buffers, which a forward pass changes before anybody can look at it.
            Those that its state dict leaves out do not change in training, or a resumed run would lose them.
        policy: "stop" ends the run at the first refused step, "skip" passes over it and ends after ten in a row.
    """

    def __init__(self, model: nn.Module, policy: Literal["stop", "skip"]):
        tensors = [kept[name] for kept, name in places(model).values()]
        self.buffers, self.policy = [each for each in tensors if not isinstance(each, nn.Parameter)], policy
        self.kept = [buffer.clone() for buffer in self.buffers]
        self.skipped = self.in_a_row = 0

    def remember(self) -> None:
        """Keep the buffers of before the step."""
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back the buffers of before the step."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)

    def allows(self, means: dict[str, float], *, fp16: bool) -> bool:
        """Whether the update may be made: loss and gradient norm are finite.

        Under fp16 an infinite gradient is the gradient scaler's business, which skips the step by itself.

        Raises:
            RunError: The scaler has skipped thirty steps in a row.
        """
        finite = math.isfinite(means["loss"])
        overflow = finite and not math.isfinite(means["gradient_norm"])
        if finite and not overflow:
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        if fp16 and overflow:
            if self.in_a_row >= _MOST_OVERFLOWS_IN_A_ROW:
                raise RunError(f"the gradients overflowed fp16 {self.in_a_row} times in a row; try bf16 or a lower "
                               "`learning_rate`")
            return True
        return False

    def record(
        self, run: Path, step: int, learning_rate: float, means: dict[str, float], indices: list[int], *, write: bool
    ) -> str:
        """Undo what the step did to the buffers; write what is known of it to the run folder.

        Returns:
            A sentence for the user.
        """
        self.undo()
        evidence = run / "nonfinite" / f"step-{step}.json"
        if write:
            figures = {name: value if math.isfinite(value) else str(value) for name, value in means.items()}
            known = {"step": step, "learning_rate": learning_rate, "figures": figures, "indices": indices}
            write_json(evidence, known)
        return (
            f"step {step}: loss {means['loss']:.4g}, gradient norm {means['gradient_norm']:.4g}, learning rate "
            f"{learning_rate:.2e}; no update was made, its images are listed in {evidence}"
        )

    def insist(self) -> None:
        """Raise RunError if the policy, or the number of refused steps in a row, does not let the run go on."""
        if self.policy == "stop":
            raise RunError(
                "stopped, because a loss or gradient is not finite. The state before this step is saved: re-run "
                "the same command with `nan` skip to pass over the step; a lower `learning_rate`, `grad_clip` 1 or "
                "`mixed_precision` no may help a new run"
            )
        if self.in_a_row >= _MOST_IN_A_ROW:
            raise RunError(f"stopped after {self.in_a_row} steps in a row whose loss or gradient was not finite")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
