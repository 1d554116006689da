"""Pictures of what is there and of what a detector finds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from d_emo.detection.augment import ObjectImages

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#f032e6", "#008080", "#9a6324", "#800000", "#808000", "#42d4f4")
TITLES = ("what is there", "what is found")
GAP = 4


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
    """A picture with boxes, names, scores and masks on it, the surest on top; of a single class without its name.

    Shape: (3, H, W) uint8 -> same; objects see `detect`.
    """
    if not len(objects["boxes"]):
        return image
    if "scores" in objects:
        order = objects["scores"].argsort()
        objects = {name: value[order] for name, value in objects.items()}
    colours = [COLOURS[label % len(COLOURS)] for label in objects["labels"].tolist()]
    if len(objects.get("masks", ())):
        image = draw_segmentation_masks(image, objects["masks"].bool(), alpha=0.4, colors=colours)
    words = [class_names[label] if len(class_names) > 1 else "" for label in objects["labels"].tolist()]
    if "scores" in objects:
        words = [f"{word} {score:.0%}".strip() for word, score in zip(words, objects["scores"].tolist(), strict=True)]
    side = min(image.shape[1:])
    image = draw_bounding_boxes(image, objects["boxes"], None, colours, width=max(1, side // 120))
    return _with_tags(image, objects["boxes"].tolist(), words, colours, font_size=max(10, side // 18))


def _with_tags(
    image: Tensor, boxes: Sequence[Sequence[float]], words: Sequence[str], colours: Sequence[str], *, font_size: int
) -> Tensor:
    """Words on grounds of their colours, above the boxes, or within them where there is no room. Shape: (3, H, W)."""
    picture = F.to_pil_image(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size)
    for (left, top, _, _), word, colour in zip(boxes, words, colours, strict=True):
        if not word:
            continue
        width, height = math.ceil(draw.textlength(word, font)) + 4, font_size + 2
        x = max(0, min(round(left), picture.width - width))
        y = round(top) - height if top >= height else round(top)
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        light = np.dot(ImageColor.getrgb(colour), (0.299, 0.587, 0.114)) > 140
        draw.text((x + 2, y + height / 2), word, "black" if light else "white", font, anchor="lm")
    return F.pil_to_tensor(picture)


def truth_beside_found(
    model: nn.Module, images: ObjectImages, indices: Iterable[int], *, least_score: float = 0.3, side: int = 320,
    masks: bool = True,
) -> Image.Image:  # fmt: skip
    """Rows of two pairs: a picture with what is there, and the same with what the detector finds.

    Args:
        model: One of ours, in eval mode.
        images: Pictures and what is in them.
        indices: Which of them.
        least_score: What the detector is less sure of is left out.
        side: Of each picture, in pixels.
        masks: Whether masks are shown, where there are some.
    """
    pictures, objects = [], []
    for index in indices:
        image, target = images.read(index)
        pictures += [image, image]
        objects += [target, detect(model, image, least_score)]
    return grid_of_objects(pictures, objects, images.class_names, side=side, masks=masks, titles=2 * TITLES)


def grid_of_objects(
    images: Iterable[Tensor], objects: Iterable[dict[str, Tensor]], class_names: Sequence[str], *, side: int = 320,
    masks: bool = True, titles: Sequence[str] = (),
) -> Image.Image:  # fmt: skip
    """Pictures with what is in them, four in a row, their longer sides ``side`` px, under the columns' titles.

    Shape: of a picture (3, H, W), uint8 or float32 in [0, 1]; objects see `detect`.
    """
    cells, wanted = [], {"boxes", "labels", "scores", *["masks"] * masks}
    for image, target in zip(images, objects, strict=True):
        scale = side / max(image.shape[1:])
        size = [round(n * scale) for n in image.shape[1:]]
        scaled = {name: value.cpu() for name, value in target.items() if name in wanted}
        scaled["boxes"] = scaled["boxes"] * scale
        if "masks" in scaled:
            scaled["masks"] = F.resize(scaled["masks"].byte(), size, F.InterpolationMode.NEAREST)
        pixels = F.resize(F.to_dtype(image.cpu(), torch.uint8, scale=True), size, antialias=True)
        cells.append(F.pad(draw_objects(pixels, scaled, class_names), [0, 0, side - size[1], side - size[0]]))
    grid = F.to_pil_image(make_grid(cells, nrow=4, padding=GAP, pad_value=255))
    if not titles:
        return grid
    size = max(10, side // 14)
    titled = Image.new("RGB", (grid.width, grid.height + 2 * size), "white")
    titled.paste(grid, (0, 2 * size))
    draw, font = ImageDraw.Draw(titled), ImageFont.load_default(size)
    for column, title in enumerate(titles[: len(cells)]):
        middle = GAP + column * (side + GAP) + side / 2, size + GAP / 2
        draw.text(middle, title, "black", font, anchor="mm")
    return titled
