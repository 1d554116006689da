"""``d-emo distill``: `train` for an objective of few steps, as `DistillSettings` resolve to."""

from d_emo.cli.train import run

__all__ = ["run"]
