"""Grids of images."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from d_emo.errors import InputError
from d_emo.files import replacing
from d_emo.latents import Codec
from d_emo.models.contract import DenoiserFrame
from d_emo.sampling.classes import caption
from d_emo.sampling.sampler import Sampler
from d_emo.sampling.schedulers import steps_for
from d_emo.tables import objective_of


def draw_grid(
    images: torch.Tensor, captions: Sequence[str], columns: int, *, scale: int | None = None, names: Sequence[str] = (),
    text_size: int = 14,
) -> Image.Image:
    """One row of images per caption, the caption above its row; what is too wide takes two lines.

    Args:
        images: Row by row. Shape: (len(captions) * columns, 3, H, W) uint8.
        scale: Times which they are enlarged. Default: to 128 px or a little less.
        names: Of the columns, written once on top.
        text_size: In pixels.
    """
    scale = max(1, 128 // images.shape[-1]) if scale is None else scale
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    gap, line_height, font = 4, text_size * 22 // 14, ImageFont.load_default(text_size)
    full = columns * (width + gap) + gap
    captions = [two_lines(text, lambda text: font.getlength(text) <= full - 2 * gap) for text in captions]
    heads = [two_lines(name, lambda text: font.getlength(text) <= width) for name in names]
    bar, header = (max((len(text.splitlines()) for text in texts), default=0) * line_height
                   for texts in (captions, heads))
    bar = max(bar, gap)
    canvas = Image.new("RGB", (full, header + len(captions) * (height + bar) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        for line, text in enumerate(head.splitlines()):
            middle = gap + column * (width + gap) + width / 2
            draw.text((middle, line * line_height + 3), text, fill="black", font=font, anchor="ma")
    for row, words in enumerate(captions):
        top = header + row * (height + bar)
        for line, text in enumerate(reversed(words.splitlines()), 1):
            draw.text((gap, top + bar - line * line_height + 3), text, fill="black", font=font)
        for column in range(columns):
            pixels = images[row * columns + column].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + column * (width + gap), top + bar))
    return canvas


def two_lines(text: str, fits: Callable[[str], bool]) -> str:
    """A text as it is where it fits, else broken where its lines are most alike; what is still too wide is cut off."""
    words = text.split()
    if not fits(text) and len(words) > 1:
        breaks = [(" ".join(words[:count]), " ".join(words[count:])) for count in range(1, len(words))]
        text = "\n".join(min(breaks, key=lambda lines: max(map(len, lines))))
    lines = []
    for line in text.splitlines():
        kept = line
        while not fits(kept) and len(kept) > 1:
            kept = kept.rstrip("…")[:-1] + "…"
        lines.append(kept)
    return "\n".join(lines)


def class_grid(
    class_names: Sequence[str], rows: int, columns: int, draw: Callable[[list[int]], Iterable[torch.Tensor]]
) -> Image.Image:
    """A grid of classes from all over their order.

    Args:
        draw: Gives the images of labels. Shape: (B, 3, H, W) uint8 each.
    """
    classes = [index * len(class_names) // rows for index in range(rows)]
    images = torch.cat(list(draw([label for label in classes for _ in range(columns)])))
    return draw_grid(images, [caption(label, class_names) for label in classes], columns)


def preview_grid(
    path: Path, denoiser: DenoiserFrame, *, scheduler_config: dict[str, Any], codec: Codec, class_names: Sequence[str],
    guidance_scale: float, objective: str | None = None,
) -> None:
    """Write the sample grid of a training run: fixed classes and seeds, so that grids of different steps compare.

    Where the samples are not finite it says so and writes nothing.
    """
    rows, columns = min(8, len(class_names)), 2  # few: a large model on a CPU must get through them
    steps = steps_for(objective or objective_of(scheduler_config), None, 20)
    sampler = Sampler(denoiser, codec, scheduler_config, steps=steps, guidance=guidance_scale, objective=objective)
    try:
        grid = class_grid(class_names, rows, columns, lambda labels: sampler.images(labels, range(len(labels))))
    except InputError as error:  # values that are not finite: no reason to stop a training run
        print(f"no sample grid {path}: {error}", file=sys.stderr, flush=True)
        return
    with replacing(path) as temporary:
        grid.save(temporary, format="PNG")
