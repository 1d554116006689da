"""Training: one loop (`fit`), and a task for each kind of model."""

from typing import Any

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    if name != "fit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from d_emo.training.loop import fit  # accelerate, which what only measures can do without

    return fit
