"""Pictures of images beside their classes in colour."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from d_emo.segmentation.images import IGNORED

GAP = 4


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class, neighbours far apart, and black for what is ignored. Shape: (256, 3) uint8."""
    colours = np.zeros((IGNORED + 1, 3), dtype=np.uint8)
    for label in range(num_classes):
        hue, light = label * 0.618034 % 1, (0.95, 0.7, 0.5)[label % 3]
        colours[label] = np.rint(255 * np.array(colorsys.hsv_to_rgb(hue, 0.85, light)))
    return colours


def overlay(image: Tensor, classes: Tensor, colours: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """An image under the colours of its classes. Shape: (3, H, W) uint8, (H, W) -> (H, W, 3) uint8."""
    pixels, tint = image.permute(1, 2, 0).cpu().numpy(), colours[classes.cpu().numpy().astype(np.uint8)]
    return np.rint((1 - opacity) * pixels + opacity * tint).astype(np.uint8)


def side_by_side(rows: Sequence[Sequence[np.ndarray]], largest: int | None = None) -> Image.Image:
    """Pictures in rows, those of a row beside each other, made smaller where a side has more than ``largest`` pixels.

    Shape: (H, W, 3) uint8 each.
    """
    rows = [[smaller(each, largest) for each in row] for row in rows]
    widths = [max(row[column].shape[1] for row in rows) for column in range(len(rows[0]))]
    heights = [max(each.shape[0] for each in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(heights) + 1)), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for each, width in zip(row, widths, strict=True):
            canvas.paste(Image.fromarray(each), (left, top))
            left += width + GAP
        top += height + GAP
    return canvas


def smaller(picture: np.ndarray, largest: int | None) -> np.ndarray:
    """A picture whose longer side has at most so many pixels. Shape: (H, W, 3) -> (h, w, 3) uint8."""
    if largest is None or max(picture.shape[:2]) <= largest:
        return picture
    shrunk = Image.fromarray(picture)
    shrunk.thumbnail((largest, largest), Image.Resampling.BOX)
    return np.asarray(shrunk)
