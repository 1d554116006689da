"""Settings that the training of detectors and of segmenters share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from d_emo.config.base import setting
from d_emo.config.ranges import Count, NotNegative
from d_emo.config.training import RehearsedSettings, RunSettings
from d_emo.errors import InputError
from d_emo.tables import SCENES


@dataclass(frozen=True, kw_only=True)
class DenseSettings(RunSettings, RehearsedSettings, ABC):
    """The built-in data, and what the papers' recipes for detectors and for segmenters have in common."""

    dataset: str = setting(
        "digit-scenes", "built-in pictures of objects, when no others are named", group="Data", choices=SCENES
    )
    num_images: Count = setting(2000, "number of different built-in pictures to train on")
    flip: bool | None = setting(
        None, "mirror pictures at random. Default: yes, but not where a mirrored object is of no class, as a digit"
    )
    weight_decay: NotNegative = setting(0.05, "AdamW weight decay, on matrices and convolutions only")
    schedule: Literal["constant", "cosine", "constant-cosine", "poly"] = setting(
        "constant-cosine", "learning rate after the warm-up; constant-cosine: constant for the first half of the run; "
        "poly: falls as the undone part to the power 0.9"
    )
    ema_warmup: bool = setting(True, "let the decay grow as (1 + n) / (10 + n) first; for short runs")

    @property
    @abstractmethod
    def own_data(self) -> str | None:
        """The path of data that are not built in."""

    @property
    def mirrors(self) -> bool:
        """Whether a mirrored object is still of its class."""
        return self.own_data is not None or SCENES[self.dataset].mirrors

    def check(self) -> None:
        if self.flip and not self.mirrors:
            raise InputError(f"`flip`: of {SCENES[self.dataset].title} a mirror image is of no class; leave it away")
