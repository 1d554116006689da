"""``d-emo train-segmenter``."""

from collections.abc import Iterator
from pathlib import Path

from d_emo.cli.dry_run import dry_run_of_scenes
from d_emo.cli.trained import report
from d_emo.config import DoctorSettings, SegmenterSettings
from d_emo.io.hub import prepare_push
from d_emo.io.snapshot import load_classifier
from d_emo.segmentation.contents import describe_masks
from d_emo.text import markdown_table
from d_emo.training import fit
from d_emo.training.segmenter import SegmenterTask


def run(settings: SegmenterSettings) -> None:
    """Do it."""
    task = SegmenterTask(settings)
    if settings.dry_run:
        contents = describe_masks(task.images, DoctorSettings.sample)
        return dry_run_of_scenes(task, contents, lambda tried: task.picture(tried.batch))
    prepare_push(settings.push_to_hub)
    report(fit(task, settings, preview=task.preview), settings, quality)


def quality(snapshot: Path) -> Iterator[str]:
    """IoU and Dice of each class and their means, where they were measured."""
    meta = load_classifier(snapshot, "segmenter").meta
    if measured := meta.get("quality"):
        names, nothing = meta["class_names"], [None] * len(meta["class_names"])
        shares = zip(names, measured["iou"], measured.get("dice", nothing), strict=True)  # older ones lack the last
        rows = [[name, *("-" if share is None else f"{100 * share:.1f}" for share in both)] for name, *both in shares]
        yield markdown_table(["class", "IoU, %", "Dice, %"], rows)
        dice = f"mDice {measured['mean_dice']:.2%}, " if "mean_dice" in measured else ""
        yield (f"mIoU {measured['mean_iou']:.2%}, {dice}aAcc {measured['pixel_accuracy']:.2%}, mAcc "
               f"{measured['mean_accuracy']:.2%} of {measured['images']:,} held-out images")  # fmt: skip
