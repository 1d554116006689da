"""Which form every operator of a network takes on this machine, and why not another."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from d_emo.kernels.dispatch import Call, record

MODES = {"training": (True, False), "training, compiled": (True, True), "inference": (False, False),
         "inference, compiled": (False, True)}  # fmt: skip
"""Whether the network trains, and whether it is compiled."""


class Explanation(dict[str, Counter[Call]]):
    """By mode, how often every call was made; printed as a markdown table."""

    def __str__(self) -> str:
        lines = ["| mode | operator | map | calls | form | why not another |", "|---|---|---|---:|---|---|"]
        for mode, calls in self.items():
            for call, count in calls.items():
                shape, why = " x ".join(map(str, call.shape)), "; ".join(f"{form}: {no}" for form, no in call.refused)
                lines.append(f"| {mode} | {call.operator} | {shape} | {count} | {call.form} | {why} |")
        return "\n".join(lines)


def explain(model: nn.Module, *inputs: Any, compiled: bool = True) -> Explanation:
    """Run a network once in each mode and note the form of every call of an operator.

    Of a compiled network it is what is decided while it is traced; nothing is built. The network is left as it was,
    its statistics too; autocast is the caller's.

    Args:
        model: the network.
        inputs: of its forward pass.
        compiled: in the two compiled modes too.

    Shape: any.
    """
    explanation = Explanation()
    for mode, (training, traced) in MODES.items():
        if not traced or compiled:
            with _unchanged(model), torch.set_grad_enabled(training), record() as calls:
                _traced(model.train(training))(*inputs) if traced else model.train(training)(*inputs)
            explanation[mode] = Counter(calls)
    return explanation


def _traced(model: nn.Module) -> Any:
    torch._dynamo.reset()  # what was traced before is not traced again, and would not be noted
    return torch.compile(lambda *inputs: model(*inputs), backend="eager", dynamic=False)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Within this context a network may be switched to another mode and move its statistics, and draw at random."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
