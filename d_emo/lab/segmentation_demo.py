"""A classifier of digits, a segmenter that starts from it, and the floor: the same head on a network never trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from d_emo.config import ClassifierSettings, SegmentationDemoSettings, SegmenterSettings
from d_emo.files import replacing
from d_emo.io.segmenter import OpenSegmenter, open_segmenter
from d_emo.io.snapshot import load_classifier
from d_emo.segmentation.images import LabelledScenes
from d_emo.segmentation.measures import segment
from d_emo.segmentation.pictures import overlay, palette, side_by_side
from d_emo.text import markdown_table
from d_emo.training import fit
from d_emo.training.classifier import ClassifierTask
from d_emo.training.segmenter import SegmenterTask

CLASSIFIER: dict[str, Any] = {
    "model": "emov2_1m", "model_options": {"window_size": 2}, "dataset": "digits", "image_size": 64, "batch_size": 32,
    "micro_batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 30, "ema_decay": 0.99, "shift": 0.05,
    "snapshot_every": 250, "state_every": 50, "log_every": 10,
}  # fmt: skip
SEGMENTER: dict[str, Any] = {
    "model": "segformer-emov2_1m", "model_options": {"window_size": 3}, "image_size": 96, "batch_size": 16,
    "micro_batch_size": 16, "learning_rate": 1e-3, "head_lr_scale": 5.0, "warmup_steps": 20, "grad_clip": 1.0,
    "scale_range": [0.75, 1.5], "ema_decay": 0.99, "snapshot_every": 1000, "state_every": 50, "log_every": 10,
}  # fmt: skip
ROWS = 5


def run_demo(settings: SegmentationDemoSettings, say: Callable[[str], None] = print) -> Path:
    """Train all three, print their mIoU on held-out scenes, and write the picture, whose path it returns."""
    folder = Path(settings.output_dir)
    given = {"seed": settings.seed, "tracker": "none"}
    say("1 of 3: a classifier of scanned digits")
    classifier = ClassifierSettings(
        **{**CLASSIFIER, **given, "max_steps": settings.classifier_steps, "output_dir": str(folder / "classifier")}
    )
    fit(ClassifierTask(classifier), classifier)
    runs = {
        "segmenter": ("2 of 3: a segmenter that starts from it", {"init_from": str(folder / "classifier")}),
        "floor": ("3 of 3: the floor, the same head on a backbone that was never trained", {"freeze_backbone": True}),
    }
    opened: dict[str, OpenSegmenter] = {}
    for name, (title, changes) in runs.items():
        say(title)
        run = SegmenterSettings(
            **{**SEGMENTER, **given, **changes, "max_steps": settings.max_steps, "output_dir": str(folder / name)}
        )
        task = SegmenterTask(run)
        fit(task, run, preview=task.preview)
        opened[name] = open_segmenter(str(folder / name))
    rows = []
    for name in runs:
        quality = load_classifier(folder / name, "segmenter").meta["quality"]
        figures = [quality[key] for key in ("mean_iou", "pixel_accuracy", "mean_accuracy")]
        rows.append([name, *(f"{100 * figure:.1f}" for figure in figures), str(quality["images"])])
    say(markdown_table(["run", "mIoU, %", "aAcc, %", "mAcc, %", "held-out scenes"], rows))
    picture = folder / "segmentation.png"
    with replacing(picture) as temporary:
        compare(list(opened.values())).save(temporary, format="PNG")
    say(f"picture  {picture} (scene, truth, segmenter, floor)")
    return picture


def compare(segmenters: list[OpenSegmenter]) -> Any:
    """Held-out scenes, their truth, and what each segmenter makes of them, side by side."""
    scenes = LabelledScenes(2 * SEGMENTER["image_size"], num_images=ROWS, split="test", seed=1)
    colours, rows = palette(len(scenes.class_names)), []
    for index in range(ROWS):
        image, truth = scenes[index]
        found = [segment(each.model, image, each.image_size).argmax(dim=0) for each in segmenters]
        rows.append([image.permute(1, 2, 0).numpy(), *(overlay(image, each, colours) for each in (truth, *found))])
    return side_by_side(rows)
