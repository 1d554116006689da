"""``d-emo train-segmenter``."""

from d_emo.cli.dry_run import dry_run_of_scenes
from d_emo.config import DoctorSettings, SegmenterSettings
from d_emo.io.hub import prepare_push, push_snapshot
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
    snapshot = fit(task, settings, preview=task.preview)
    if snapshot is None:
        return
    print(f"snapshot  {snapshot}")
    meta = load_classifier(snapshot, "segmenter").meta
    if quality := meta.get("quality"):
        names, nothing = meta["class_names"], [None] * len(meta["class_names"])
        shares = zip(names, quality["iou"], quality.get("dice", nothing), strict=True)  # older ones lack the last
        rows = [[name, *("-" if share is None else f"{100 * share:.1f}" for share in both)] for name, *both in shares]
        print(markdown_table(["class", "IoU, %", "Dice, %"], rows))
        dice = f"mDice {quality['mean_dice']:.2%}, " if "mean_dice" in quality else ""
        print(f"mIoU {quality['mean_iou']:.2%}, {dice}aAcc {quality['pixel_accuracy']:.2%}, mAcc "
              f"{quality['mean_accuracy']:.2%} of {quality['images']:,} held-out images")  # fmt: skip
    if settings.push_to_hub:
        print(f"pushed    {push_snapshot(snapshot, settings.push_to_hub)}")
