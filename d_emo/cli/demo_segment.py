"""How ``d-emo demo segment`` ends: IoU beside a floor, and a picture."""

from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image
from torch import nn

from d_emo.data import spread
from d_emo.io.segmenter import OpenSegmenter, open_segmenter
from d_emo.io.snapshot import load_meta
from d_emo.sampling import save_png
from d_emo.segmentation.images import LabelledScenes
from d_emo.segmentation.measures import Quality, measure, segment
from d_emo.segmentation.pictures import gallery, lit
from d_emo.text import markdown_table
from d_emo.training.segmenter import HELD_OUT

RUNS = {"segmenter": "demo/segmenter", "floor: the same head on frozen random weights": "demo/segmenter-floor"}
PICTURE = Path("demo/segment.png")
WIDE = 128
"""Side, in pixels, of scenes with up to six digits, which no run trains on."""
TITLES = ("picture", "prediction", "ground truth")
REMARK = "left: held-out scenes of the kind trained on;  right: larger scenes with more digits, of a kind never seen"
ROWS, SIDE = 4, 256
COLOURS = np.array([
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49), (170, 90, 240), (66, 212, 244),
    (240, 50, 230), (191, 239, 69), (250, 190, 212),
], dtype=np.uint8)  # fmt: skip
"""Of the ten digits."""


def conclude() -> None:
    """Print IoU of the segmenter and of its floor, and draw held-out scenes, what it finds in them and their truth."""
    rows, by_class, wide = [], [], LabelledScenes(WIDE, num_images=HELD_OUT, split="test")
    for name, folder in RUNS.items():
        meta, found = load_meta(folder, "segmenter"), open_segmenter(folder)
        quality, count = meta["quality"], meta["quality"]["images"]
        ground, *digits = (0.0 if iou is None else iou for iou in quality["iou"])
        areas, _ = measure(found.model, wide, WIDE, spread(len(wide), count))
        shares = (quality["mean_iou"], fmean(digits), ground, quality["pixel_accuracy"],
                  Quality.of(areas.sums).mean_iou)  # fmt: skip
        rows.append([name, *(f"{100 * share:.1f}" for share in shares), f"{meta['training_minutes']:.1f}"])
        by_class.append([name.partition(":")[0], *(f"{100 * iou:.0f}" for iou in digits)])
    meta, segmenter = load_meta(RUNS["segmenter"], "segmenter"), open_segmenter(RUNS["segmenter"])
    scenes = LabelledScenes(meta["image_size"], num_images=HELD_OUT, split="test", dataset=meta["data"])
    save_png(picture(segmenter, scenes, wide), PICTURE, {"demo": "segment"})
    head = [f"{count} held-out scenes", "mIoU, %", "digits", "background", "aAcc, %", "mIoU of larger ones", "minutes"]
    print(markdown_table(["IoU of digits, %", *scenes.class_names[1:]], by_class))
    print(markdown_table(head, rows))
    print(f"picture   {PICTURE}: held-out scenes, what is found in them, and what is there")


def picture(segmenter: OpenSegmenter, scenes: LabelledScenes, wide: LabelledScenes) -> Image.Image:
    """Rows of a scene, the classes that are found in it, and those that are there; wide scenes on the right."""
    kinds = (scenes, segmenter.image_size), (wide, WIDE)
    rows = [cells(segmenter.model, each, index, size) for each, size in kinds for index in spread(len(each), ROWS)]
    names = dict(zip(scenes.class_names[1:], COLOURS, strict=True))
    return gallery(rows, TITLES, names, REMARK, text_size=22)


def cells(model: nn.Module, scenes: LabelledScenes, index: int, size: int) -> list[np.ndarray]:
    """A scene, its prediction and its truth, enlarged. Shape: (SIDE, SIDE, 3) uint8 each."""
    image, truth = scenes[index]
    found = segment(model, image, size).argmax(dim=0).cpu()
    colours = np.concatenate([np.zeros((1, 3), np.uint8), COLOURS])
    shown = image.permute(1, 2, 0).numpy(), lit(image, found, colours), lit(image, truth, colours)
    return [np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.NEAREST)) for each in shown]
