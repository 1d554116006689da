"""``d-emo train-detector``."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from d_emo.cli.dry_run import dry_run_of_scenes
from d_emo.cli.trained import report
from d_emo.config import DetectorSettings, DoctorSettings
from d_emo.data import spread
from d_emo.detection.contents import describe_objects
from d_emo.detection.drawing import truth_beside_found
from d_emo.io.hub import prepare_push
from d_emo.io.snapshot import load_classifier
from d_emo.text import markdown_table
from d_emo.training import fit
from d_emo.training.detector import DetectorTask


def run(settings: DetectorSettings) -> None:
    """Do it."""
    task = DetectorTask(settings)
    if settings.dry_run:
        contents = describe_objects(task.source, DoctorSettings.sample)
        return dry_run_of_scenes(task, contents, lambda tried: task.picture(tried.batch))
    prepare_push(settings.push_to_hub)

    def preview(path: Path, model: nn.Module) -> None:
        if task.held_out is not None:
            truth_beside_found(model, task.held_out, spread(len(task.held_out), 8)).save(path)

    report(fit(task, settings, preview=preview), settings, precision)


def precision(snapshot: Path) -> Iterator[str]:
    """The table of its average precision on held-out images, where there are any."""
    measured = load_classifier(snapshot, "detector").meta.get("average_precision", {})
    if measured:
        figures = [[kind, *(f"{100 * value:.1f}" if value >= 0 else "-1" for value in each.values())]
                   for kind, each in measured.items()]  # fmt: skip
        yield markdown_table(["held out, %", *measured["bbox"]], figures)
