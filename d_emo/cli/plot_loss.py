"""``d-emo plot-loss``."""

from pathlib import Path

from d_emo.config import PlotSettings
from d_emo.lab.loss_curves import choose_published, plot_losses, read_run


def run(settings: PlotSettings) -> None:
    """Do it."""
    runs = [read_run(folder) for folder in settings.runs]
    published = choose_published(runs, settings.published)
    plot_losses(runs, published, Path(settings.output), smooth=settings.smooth)
    print(f"picture    {settings.output}")
    for run in runs:
        curve = run.curves["loss"].smoothed(settings.smooth)
        print(f"run        {run.folder}: {run.model}, loss {curve.values[-1]:.4f} at step {curve.steps[-1]:,}")
    for name, curve in published.items():
        print(f"published  {name}: loss {curve.values[-1]:.4f} at step {curve.steps[-1]:,}, ImageNet 256 x 256")
    if not published and settings.published == "auto":
        print("published  no curve of these models with this objective")

