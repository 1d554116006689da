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
        rows = [[name, "-" if iou is None else f"{100 * iou:.1f}"]
                for name, iou in zip(meta["class_names"], quality["iou"], strict=True)]  # fmt: skip
        print(markdown_table(["class", "IoU, %"], rows))
        print(f"mIoU {quality['mean_iou']:.2%}, aAcc {quality['pixel_accuracy']:.2%}, mAcc "
              f"{quality['mean_accuracy']:.2%} of {quality['images']:,} held-out images")  # fmt: skip
    if settings.push_to_hub:
        print(f"pushed    {push_snapshot(snapshot, settings.push_to_hub)}")
