"""Training: one loop (`fit`), and a task for each kind of model."""

from d_emo.training.loop import fit

__all__ = ["fit"]
