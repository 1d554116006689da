"""Settings that the training of detectors and of segmenters share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from d_emo.config.base import setting
from d_emo.config.ranges import NotNegative
from d_emo.config.training import RunSettings


@dataclass(frozen=True, kw_only=True)
class DenseSettings(RunSettings):
    """The part of the papers' recipes that all their detectors and segmenters have in common."""

    weight_decay: NotNegative = setting(0.05, "AdamW weight decay, on matrices and convolutions only")
    schedule: Literal["constant", "cosine", "constant-cosine", "poly"] = setting(
        "constant-cosine", "learning rate after the warm-up; constant-cosine: constant for the first half of the run; "
        "poly: falls as the undone part to the power 0.9"
    )
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")
