"""``d-emo distill``: `train` for a one-step objective, as `DistillSettings` resolve to."""

from d_emo.cli.train import run

__all__ = ["run"]
