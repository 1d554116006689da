"""Sheets of captioned pictures, for the demos."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, RIGHT, WRONG = "#202020", "#1a7f37", "#cf222e"
GAP, LINE = 8, 22


class Cell(NamedTuple):
    """A picture and what is written below it. Shape: picture (h, w, 3) uint8."""

    picture: np.ndarray
    caption: str = ""
    colour: str = INK


def sheet(rows: Sequence[Sequence[Cell]], side: int, *, titles: Sequence[str] = (), note: str = "") -> Image.Image:
    """Pictures in rows, each ``side`` pixels wide and high, with titles above the columns and a note at the end."""
    columns = max(map(len, rows))
    below = [LINE if any(cell.caption for cell in row) else 0 for row in rows]
    width = columns * (side + GAP) + GAP
    height = GAP + (LINE if titles else 0) + sum(side + GAP + each for each in below) + (LINE if note else 0)
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)

    def write(text: str, left: int, top: int, room: int, colour: str = INK) -> None:
        draw.text((left + room / 2, top + LINE / 2), text, fill=colour, font=font, anchor="mm")

    top = GAP
    for number, title in enumerate(titles):
        write(title, GAP + number * (side + GAP), top - GAP // 2, side)
    top += LINE if titles else 0
    for row, room in zip(rows, below, strict=True):
        for number, cell in enumerate(row):
            left = GAP + number * (side + GAP)
            canvas.paste(Image.fromarray(cell.picture).resize((side, side), Image.Resampling.BICUBIC), (left, top))
            if cell.caption:
                write(cell.caption, left, top + side, side, cell.colour)
        top += side + room + GAP
    if note:
        write(note, 0, top - GAP // 2, width)
    return canvas
