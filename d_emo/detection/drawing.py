"""Pictures of what is there and of what a detector finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from d_emo.detection.augment import ObjectImages

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#f032e6", "#008080", "#9a6324", "#800000", "#808000", "#42d4f4")
MIN_TEXT, BAR = 12, 22
"""Pixels of the letters on a picture, at least, and of a line of titles."""


@torch.no_grad()
def detect(model: nn.Module, image: Tensor, least_score: float) -> dict[str, Tensor]:
    """What a detector in eval mode finds in a picture, the surest first.

    Args:
        model: One of ours.
        image: A picture.
        least_score: What is less sure is left out.

    Shape: (3, H, W) uint8 -> boxes (n, 4), scores (n,), labels (n,) from 0, and where it has them masks (n, H, W) bool.
    """
    (found,) = model([image.to(next(model.parameters()).device).float() / 255])
    sure = found["scores"] >= least_score
    kept = {name: value[sure].cpu() for name, value in found.items()}
    if "masks" in kept:
        kept["masks"] = kept["masks"][:, 0] >= 0.5
    return {**kept, "labels": kept["labels"] - model.first_label}


def draw_objects(image: Tensor, objects: dict[str, Tensor], class_names: Sequence[str]) -> Tensor:
    """A picture with boxes, names, scores and masks on it. Shape: (3, H, W) uint8 -> same; see `detect`."""
    if not len(objects["boxes"]):
        return image
    colours = [COLOURS[label % len(COLOURS)] for label in objects["labels"].tolist()]
    if len(objects.get("masks", ())):
        image = draw_segmentation_masks(image, objects["masks"].bool(), alpha=0.4, colors=colours)
    words = [class_names[label] for label in objects["labels"].tolist()]
    if "scores" in objects:
        words = [f"{word} {score:.0%}" for word, score in zip(words, objects["scores"].tolist(), strict=True)]
    image = draw_bounding_boxes(image, objects["boxes"], colors=colours, width=max(1, min(image.shape[1:]) // 160))
    return _named(image, objects["boxes"].tolist(), words, colours)


def _named(image: Tensor, boxes: Sequence[Sequence[float]], words: Sequence[str], colours: Sequence[str]) -> Tensor:
    """A picture with words on colour, above their boxes where there is room. Shape: (3, H, W) uint8."""
    picture = F.to_pil_image(image)
    draw, size = ImageDraw.Draw(picture), max(MIN_TEXT, min(picture.size) // 24)
    font = ImageFont.load_default(size)
    for (left, top, _, _), word, colour in zip(boxes, words, colours, strict=True):
        width, height = round(font.getlength(word)) + 6, size + 4
        left = max(0, min(left, picture.width - width))
        top = top - height if top >= height else top
        draw.rectangle((left, top, left + width, top + height), fill=colour)
        dark = ImageColor.getcolor(colour, "L") < 140
        draw.text((left + 3, top + height / 2), word, fill="white" if dark else "black", font=font, anchor="lm")
    return F.pil_to_tensor(picture)


def truth_beside_found(
    model: nn.Module, images: ObjectImages, indices: Iterable[int], *, least_score: float = 0.3, side: int = 320
) -> Image.Image:
    """Rows of two pairs: a picture with what is there, and the same with what the detector finds."""
    pictures, objects = [], []
    for index in indices:
        image, target = images.read(index)
        pictures += [image, image]
        objects += [target, detect(model, image, least_score)]
    return grid_of_objects(pictures, objects, images.class_names, side=side, titles=("there", "found") * 2)


def grid_of_objects(
    images: Iterable[Tensor], objects: Iterable[dict[str, Tensor]], class_names: Sequence[str], *, side: int = 320,
    titles: Sequence[str] = (),
) -> Image.Image:
    """Pictures with what is in them, four in a row, their longer sides ``side`` px, under the columns' titles.

    Shape: of a picture (3, H, W), uint8 or float32 in [0, 1]; objects see `detect`.
    """
    cells = []
    for image, target in zip(images, objects, strict=True):
        scale = side / max(image.shape[1:])
        size = [round(n * scale) for n in image.shape[1:]]
        shown = {name: value.cpu() for name, value in target.items()
                 if name in ("boxes", "labels", "scores", "masks")}  # fmt: skip
        shown["boxes"] = shown["boxes"] * scale
        if "masks" in shown:
            shown["masks"] = F.resize(shown["masks"].byte(), size, F.InterpolationMode.NEAREST)
        pixels = F.resize(F.to_dtype(image.cpu(), torch.uint8, scale=True), size, antialias=True)
        drawn = draw_objects(pixels, shown, class_names)
        cells.append(F.pad(drawn, [0, 0, side - size[1], side - size[0]]))
    grid = F.to_pil_image(make_grid(cells, nrow=4, padding=4, pad_value=255))
    if not titles:
        return grid
    canvas = Image.new("RGB", (grid.width, grid.height + BAR), "white")
    canvas.paste(grid, (0, BAR))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(BAR - 6)
    for column, title in enumerate(titles[: len(cells)]):
        draw.text((4 + column * (side + 4) + side / 2, BAR / 2 + 2), title, fill="black", font=font, anchor="mm")
    return canvas
