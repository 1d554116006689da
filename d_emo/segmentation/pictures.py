"""Pictures of images beside their classes in colour."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from d_emo.segmentation.images import IGNORED

GAP, TEXT, LINE = 4, 14, 22
"""Pixels between pictures, of letters, and of a line of them."""


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


def side_by_side(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Pictures in rows, those of a row beside each other; only later rows may be shorter than the first.

    Shape: (H, W, 3) uint8 each.
    """
    widths = [max(row[column].shape[1] for row in rows if column < len(row)) for column in range(len(rows[0]))]
    heights = [max(each.shape[0] for each in row) for row in rows]
    canvas = Image.new("RGB", (sum(widths) + GAP * (len(widths) + 1), sum(heights) + GAP * (len(heights) + 1)), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for each, width in zip(row, widths, strict=False):
            canvas.paste(Image.fromarray(each), (left, top))
            left += width + GAP
        top += height + GAP
    return canvas


def with_legend(
    picture: Image.Image, class_names: Sequence[str], colours: np.ndarray, labels: Sequence[int]
) -> Image.Image:
    """A picture with the colours and names of some classes below it. Shape: colours (256, 3) uint8."""
    font, places, left, top = ImageFont.load_default(TEXT), [], GAP, 0
    for label in labels:
        width = TEXT + GAP + round(font.getlength(class_names[label]))
        if left > GAP and left + width > picture.width:
            left, top = GAP, top + LINE
        places.append((left, top, label))
        left += width + 3 * GAP
    canvas = Image.new("RGB", (picture.width, picture.height + top + LINE), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for left, top, label in places:
        top += picture.height
        draw.rectangle((left, top, left + TEXT, top + TEXT), fill=tuple(colours[label].tolist()))
        draw.text((left + TEXT + GAP, top), class_names[label], fill="black", font=font)
    return canvas
