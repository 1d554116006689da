"""``d-emo segment``."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from d_emo.cli.inputs import find_images, free_names, read_images
from d_emo.cli.outputs import claimed_default
from d_emo.config import SegmentSettings
from d_emo.data import Reading
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.files import write_json
from d_emo.io.segmenter import OpenSegmenter, open_segmenter
from d_emo.segmentation.measures import segment
from d_emo.segmentation.pictures import overlay, palette, side_by_side, with_legend
from d_emo.segmentation.sliding import Windows


def run(settings: SegmentSettings) -> None:
    """Do it."""
    files, segmenter = find_images(settings.images), open_segmenter(settings.model)
    segmenter.model.to(best_device())
    reading, (size, windows) = Reading.of(settings), seen_by(segmenter, settings)
    with claimed_default("segment", settings, f"samples/segment-{files[0].stem}") as folder:
        names, done = free_names(files), 0
        pictures = read_images(files, reading, skip_corrupt=settings.skip_corrupt)
        for number, file, pixels in tqdm(pictures, total=len(files), unit="image", disable=len(files) < 5):
            logits = segment(segmenter.model, pixels, size, windows=windows)
            write(folder, names[number], file, pixels, segmenter, logits)
            done += 1
        print(f"pictures  {folder} ({done} of .png, _classes.png and .json each, by {segmenter.name})")


def seen_by(segmenter: OpenSegmenter, settings: SegmentSettings) -> tuple[int | None, Windows | None]:
    """Pixels of the shorter side (None: as it is) and windows that the network sees; InputError for windows that leave
    pixels out."""
    known = None if settings.image_size else segmenter.windows
    if not known and settings.crop is None and settings.stride is None:
        if settings.blend is not None:
            raise InputError("`blend` is of windows, and whole images are segmented; give `crop` or `stride`")
        return settings.image_size or segmenter.image_size, None
    size = settings.crop or (known.size if known else segmenter.image_size)
    stride = settings.stride or (known.stride if known and known.size == size else max(1, size * 2 // 3))
    return settings.image_size, Windows(size, stride, settings.blend or (known.blend if known else "mean"))


def write(
    folder: Path, name: str, file: Path, pixels: torch.Tensor, segmenter: OpenSegmenter, logits: torch.Tensor
) -> None:
    """The picture beside its classes in colour, the classes as a mask, and their shares in words.

    Shape: pixels (3, H, W) uint8, logits (num_classes, H, W).
    """
    likely, found = logits.softmax(dim=0).cpu().max(dim=0)  # (H, W) each
    colours = palette(len(segmenter.class_names))
    picture = side_by_side([[pixels.permute(1, 2, 0).numpy(), overlay(pixels, found, colours)]])
    picture = with_legend(picture, segmenter.class_names, colours, found.unique().tolist())
    picture.save(folder / f"{name}.png")
    Image.fromarray(found.numpy().astype(np.uint8)).save(folder / f"{name}_classes.png")
    counts = found.flatten().bincount(minlength=len(segmenter.class_names)).tolist()
    classes = [
        {"class": label, "name": segmenter.class_names[label], "pixels": counts[label],
         "share": round(counts[label] / found.numel(), 6),
         "mean_probability": round(likely[found == label].mean().item(), 6), "colour": colours[label].tolist()}
        for label in sorted(range(len(counts)), key=lambda label: -counts[label]) if counts[label]
    ]  # fmt: skip
    height, width = found.shape
    write_json(folder / f"{name}.json", {
        "image": str(file), "model": segmenter.name, "width": width, "height": height, "mask": f"{name}_classes.png",
        "classes": classes,
    })  # fmt: skip
