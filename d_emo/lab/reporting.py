"""What all reports share: their folder, and empty plots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d_emo.errors import InputError, imported


def make_folder(folder: Path, what: str) -> None:
    """Make a folder; an InputError says ``what`` cannot be made, and why."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{what} {folder} cannot be made: {error.strerror}") from None


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, without a window, its sides in inches; InputError without matplotlib."""
    figures = imported("matplotlib.figure", "drawing needs matplotlib", "d-emo[plot]")
    return figures.Figure(figsize=(width, height), layout="constrained")


def logarithmic(panel: Any, name: str, numbers: Sequence[float]) -> None:
    """Make the axis ``name`` of a panel logarithmic, with these numbers of each decade written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set(**{f"{name}scale": "log"})
    axis = getattr(panel, f"{name}axis")
    axis.set(major_locator=LogLocator(subs=numbers), minor_locator=NullLocator(), major_formatter="{x:g}")
