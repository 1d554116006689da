"""What all plots have in common."""

from collections.abc import Sequence
from typing import Any

from d_emo.errors import InputError


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, without a window. Width and height in inches.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs matplotlib: pip install 'd-emo[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def logarithmic(panel: Any, name: str, numbers: Sequence[float]) -> None:
    """Make the axis ``name`` of a panel logarithmic, with these numbers of each decade written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(panel, f"set_{name}scale")("log")
    axis = getattr(panel, f"{name}axis")
    axis.set_major_locator(LogLocator(subs=numbers))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
