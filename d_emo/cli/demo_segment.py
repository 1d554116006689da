"""How ``d-emo demo segment`` ends: IoU beside a floor, and a picture."""

from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image
from torch import nn

from d_emo.data import spread
from d_emo.io.segmenter import open_segmenter
from d_emo.io.snapshot import load_meta
from d_emo.sampling import save_png
from d_emo.segmentation.images import LabelledScenes
from d_emo.segmentation.measures import segment
from d_emo.segmentation.pictures import gallery, lit
from d_emo.text import markdown_table
from d_emo.training.segmenter import HELD_OUT

RUNS = {"segmenter": "demo/segmenter", "floor: the same head on frozen random weights": "demo/segmenter-floor"}
PICTURE = Path("demo/segment.png")
TITLES = ("picture", "prediction", "ground truth")
SHOWN, SIDE = 8, 192
COLOURS = np.array([
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49), (170, 90, 240), (66, 212, 244),
    (240, 50, 230), (191, 239, 69), (250, 190, 212),
], dtype=np.uint8)  # fmt: skip
"""Of the ten digits."""


def conclude() -> None:
    """Print IoU of the segmenter and of its floor, and draw held-out scenes, what it finds in them and their truth."""
    segmenter = open_segmenter(RUNS["segmenter"])
    metas = {name: load_meta(folder, "segmenter") for name, folder in RUNS.items()}
    summary, by_class = [], []
    for name, meta in metas.items():
        quality = meta["quality"]
        ground, *digits = [0.0 if iou is None else iou for iou in quality["iou"]]
        shares = quality["mean_iou"], fmean(digits), ground, quality["pixel_accuracy"]
        summary.append([name, *(f"{100 * share:.1f}" for share in shares), f"{meta['training_minutes']:.1f}"])
        by_class.append([name.partition(":")[0], *(f"{100 * iou:.0f}" for iou in digits)])
    scenes = LabelledScenes(
        segmenter.image_size, num_images=HELD_OUT, split="test", dataset=metas["segmenter"]["data"]
    )
    names = scenes.class_names[1:]
    save_png(picture(segmenter.model, scenes, segmenter.image_size), PICTURE, {"demo": "segment"})
    head = [f"{quality['images']} held-out scenes", "mIoU, %", "digits", "background", "aAcc, %", "minutes"]
    print(markdown_table(["IoU of digits, %", *names], by_class))
    print(markdown_table(head, summary))
    print(f"picture   {PICTURE}: held-out scenes, what was found in them, and what is there")


def picture(model: nn.Module, scenes: LabelledScenes, size: int) -> Image.Image:
    """Rows of a scene, the classes that are found in it, and those that are there."""
    colours = np.concatenate([np.zeros((1, 3), np.uint8), COLOURS])
    rows = []
    for index in spread(len(scenes), SHOWN):
        image, truth = scenes[index]
        found = segment(model, image, size).argmax(dim=0).cpu()
        cells = image.permute(1, 2, 0).numpy(), lit(image, found, colours), lit(image, truth, colours)
        rows.append([np.asarray(Image.fromarray(cell).resize((SIDE, SIDE), Image.Resampling.NEAREST))
                     for cell in cells])  # fmt: skip
    return gallery(rows, TITLES, dict(zip(scenes.class_names[1:], COLOURS, strict=True)))
