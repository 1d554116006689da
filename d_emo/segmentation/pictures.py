"""Pictures of images beside their classes in colour."""

import colorsys
from collections.abc import Mapping, Sequence

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


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]], largest: int | None = None, titles: Sequence[str] = ()
) -> Image.Image:
    """Pictures in rows, those of a row beside each other; only later rows may be shorter than the first.

    Args:
        rows: Shape: (H, W, 3) uint8 each.
        largest: They are made smaller where a side has more pixels.
        titles: Of the columns.
    """
    rows = [[smaller(each, largest) for each in row] for row in rows]
    widths = [max(row[column].shape[1] for row in rows if column < len(row)) for column in range(len(rows[0]))]
    heights = [max(each.shape[0] for each in row) for row in rows]
    top = LINE if titles else GAP
    size = sum(widths) + GAP * (len(widths) + 1), top + sum(heights) + GAP * len(heights)
    canvas, left = Image.new("RGB", size, "white"), GAP
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
    for title, width in zip(titles, widths, strict=bool(titles)):
        draw.text((left + width / 2, LINE / 2), title, fill="black", font=font, anchor="mm")
        left += width + GAP
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


def smaller(picture: np.ndarray, largest: int | None) -> np.ndarray:
    """A picture whose longer side has at most so many pixels. Shape: (H, W, 3) -> (h, w, 3) uint8."""
    if largest is None or max(picture.shape[:2]) <= largest:
        return picture
    shrunk = Image.fromarray(picture)
    shrunk.thumbnail((largest, largest), Image.Resampling.BOX)
    return np.asarray(shrunk)


def lit(image: Tensor, classes: Tensor, colours: np.ndarray, *, dim: float = 0.35) -> np.ndarray:
    """Classes in full colour where they are not 0, the image in dim grey elsewhere.

    Shape: (3, H, W) uint8, (H, W) -> (H, W, 3) uint8.
    """
    grey = image.float().mean(dim=0).mul(dim).byte()[..., None].expand(-1, -1, 3).cpu().numpy()
    tint = colours[classes.cpu().numpy().astype(np.uint8)]
    return np.where((classes == 0)[..., None].cpu().numpy(), grey, tint)


def gallery(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Mapping[str, Sequence[int]], remark: str = "",
    *, across: int = 2, text_size: int = 18,
) -> Image.Image:
    """Rows of pictures, several rows beside each other, with titles above and the colours of classes below.

    Args:
        rows: Pictures of one size each, as many as titles. Shape: (H, W, 3) uint8.
        titles: Of the columns.
        names: Of the classes, with their colours.
        remark: A line below.
        across: Rows beside each other.
        text_size: In pixels.
    """
    font, line = ImageFont.load_default(text_size), 2 * text_size
    count = -(-len(rows) // across)
    blocks = [side_by_side(rows[i * count : (i + 1) * count]) for i in range(across)]
    apart = 3 * GAP
    width = sum(block.width for block in blocks) + apart * (across - 1)
    canvas = Image.new("RGB", (width, line + blocks[0].height + line * (3 if remark else 2)), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for block in blocks:
        canvas.paste(block, (left, line))
        for column, title in enumerate(titles):
            middle = left + block.width * (column + 0.5) / len(titles)
            draw.text((middle, line / 2), title, fill="black", font=font, anchor="mm")
        left += block.width + apart
    top, step = line + blocks[0].height + line // 2, (width - 2 * GAP) / len(names)
    for number, (name, colour) in enumerate(names.items()):
        box = [GAP + number * step, top, GAP + (number + 1) * step - GAP, top + line]
        draw.rectangle(box, fill=tuple(colour))
        ink = "white" if np.dot(colour, (0.299, 0.587, 0.114)) < 128 else "black"
        draw.text(((box[0] + box[2]) / 2, top + line / 2), name, fill=ink, font=font, anchor="mm")
    draw.text((width / 2, top + line * 1.7), remark, fill="black", font=font, anchor="mm")
    return canvas
