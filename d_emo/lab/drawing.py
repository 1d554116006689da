"""What all plots have in common."""

from __future__ import annotations

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
