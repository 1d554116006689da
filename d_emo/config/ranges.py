"""Types of values in settings, each with its range, which `Settings` checks."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any

from d_emo.errors import InputError


@dataclass(frozen=True)
class Range:
    """Where a number may lie; with ``open_low`` or ``open_high`` not on that end itself."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def check(self, name: str, value: Any, kind: type) -> None:
        """Raise InputError for a value of another type, that is not finite, or outside."""
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise InputError(f"`{name}` must be {'a whole number' if kind is int else 'a number'}, not {value!r}")
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if not (above and below and math.isfinite(value)):
            shown = f"{value:g}" if isinstance(value, float) else value
            raise InputError(f"`{name}` must be {self.in_words(huge=not below)}, not {shown}")

    def in_words(self, huge: bool) -> str:
        """The range; a high end that no sensible value comes near only if one did."""
        low = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        high = "2^62" if self.high == LARGEST_SEED else f"{self.high:g}"
        high = f"{'below' if self.open_high else 'at most'} {high}"
        return low if self.high >= LARGE and not huge else f"{low} and {high}"


class ColourName:
    """A colour as Pillow knows it."""

    def check(self, name: str, value: Any, kind: type) -> None:
        """Raise InputError for a value that is none."""
        from PIL import ImageColor

        try:
            ImageColor.getrgb(value)
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"`{name}` must be a colour such as white or '#ff8000', not {value}") from None


class TrainedPart:
    """Which weights are trained: all, head or lora:RANK."""

    def check(self, name: str, value: Any, kind: type) -> None:
        """Raise InputError for a value that is none of them."""
        if value not in ("all", "head") and not re.fullmatch(r"lora:[1-9]\d{0,3}", str(value)):
            raise InputError(f"`{name}` must be all, head or lora:RANK such as lora:16, not {value}")


LARGE, LARGEST_SEED = 10**9, 2**62

Count = Annotated[int, Range(1, 10**12)]
Whole = Annotated[int, Range(0, 10**12)]
Workers = Annotated[int, Range(0, 4096)]
Seed = Annotated[int, Range(0, LARGEST_SEED)]
Steps = Annotated[int, Range(1, 1000)]
Images = Annotated[int, Range(2, 10**12)]
"""A number of images whose covariance is measured."""
ImageSide = Annotated[int, Range(8, 2**16)]
ClassifierSide = Annotated[int, Range(32, 2**16)]
"""Classifiers halve an image five times."""
Opset = Annotated[int, Range(18, 23)]
"""Versions of ONNX's operators that PyTorch writes."""
Real = Annotated[float, Range(-LARGE, LARGE)]
Positive = Annotated[float, Range(0, LARGE, open_low=True)]
NotNegative = Annotated[float, Range(0, LARGE)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, open_low=True)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
Depth = Annotated[int, Range(1, 1000)]
Layers = Annotated[int, Range(0, 1000)]
Threads = Annotated[int, Range(1, 4096)]
Port = Annotated[int, Range(1, 65535)]
Stage = Annotated[int, Range(1, 4)]
Colour = Annotated[str, ColourName()]
Trained = Annotated[str, TrainedPart()]
