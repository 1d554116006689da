"""How ``d-emo demo segment`` ends: mIoU beside a floor, and a picture."""

from pathlib import Path
from statistics import fmean

import numpy as np

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
TITLES = ("picture", "what is there", "what is found")
SHOWN, SIDE = 6, 192
COLOURS = np.array([
    (230, 25, 75), (60, 180, 75), (255, 225, 25), (67, 99, 216), (245, 130, 49), (170, 90, 240), (66, 212, 244),
    (240, 50, 230), (191, 239, 69), (250, 190, 212),
], dtype=np.uint8)  # fmt: skip
"""Of the ten digits."""


def conclude() -> None:
    """Print IoU of the segmenter and of its floor, and draw held-out scenes, their truth and what it finds."""
    segmenter = open_segmenter(RUNS["segmenter"])
    measured = {name: load_meta(folder, "segmenter")["quality"] for name, folder in RUNS.items()}
    rows = []
    for name, quality in measured.items():
        ground, *digits = quality["iou"]
        of_digits = fmean(iou for iou in digits if iou is not None)
        shares = quality["mean_iou"], ground, of_digits, quality["pixel_accuracy"]
        rows.append([name, *(f"{100 * share:.1f}" for share in shares)])
    scenes = LabelledScenes(SIDE, num_images=HELD_OUT, split="test")
    colours = np.concatenate([np.zeros((1, 3), np.uint8), COLOURS])
    shown = []
    for index in spread(len(scenes), SHOWN):
        image, truth = scenes[index]
        found = segment(segmenter.model, image, segmenter.image_size).argmax(dim=0)
        shown.append([image.permute(1, 2, 0).numpy(), lit(image, truth, colours), lit(image, found, colours)])
    picture = Path("demo/segment.png")
    names = dict(zip(segmenter.class_names[1:], COLOURS, strict=True))
    save_png(gallery(shown, TITLES, names), picture, {"demo": "segment"})
    print(markdown_table(["pixels of held-out scenes, %", "mIoU", "background", "digits", "aAcc"], rows))
    print(f"picture   {picture}: held-out scenes, what is there, and what was found")
