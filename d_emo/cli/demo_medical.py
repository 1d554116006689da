"""How ``d-emo demo medical`` ends: Dice of U-EMO, of the convolutional U-Net and of a threshold, and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from d_emo.data import spread
from d_emo.data.fundus import blurred, photograph
from d_emo.device import best_device
from d_emo.files import read_json
from d_emo.io.segmenter import OpenSegmenter, open_segmenter
from d_emo.io.snapshot import load_meta
from d_emo.sampling import save_png
from d_emo.segmentation.images import LabelledImages, LabelledScenes
from d_emo.segmentation.measures import Areas, Quality, segment
from d_emo.segmentation.pictures import gallery
from d_emo.text import markdown_table

RUNS = {"U-EMO": "demo/medical/u-emo", "U-Net": "demo/medical/unet"}
PICTURE = Path("demo/medical.png")
SHOWN = (0, 3)
"""Held-out drawings in the picture."""
SIDE = 288
FOUND, MISSED, FALSE = (255, 255, 255), (64, 140, 255), (255, 120, 40)
LEGEND = {"vessel, found": (225, 225, 225), "vessel, missed": MISSED, "found, and none": FALSE}
REMARK = "Trained on drawings only. Of the photograph there is no truth, and all that is found in it is white."


def conclude() -> None:
    """Print what both find in held-out drawings, beside what a threshold finds, and draw it beside the truth."""
    segmenters, rows = {name: open_segmenter(folder) for name, folder in RUNS.items()}, []
    size = read_json(Path(RUNS["U-EMO"]) / "config.yaml", lambda settings: settings["picture_size"])
    held_out = LabelledScenes(size, num_images=200, split="test", dataset="fundus")
    for name, folder in RUNS.items():
        meta = load_meta(folder, "segmenter")
        quality = Quality(**{key: value for key, value in meta["quality"].items() if key != "images"})
        rows.append([name, f"{meta['parameters']:,}", *in_percent(quality), f"{meta['training_minutes']:.1f}"])
        images = spread(len(held_out), meta["quality"]["images"])  # those that the networks are measured on
    darkest = fitted_threshold(LabelledScenes(size, num_images=200, dataset="fundus"))
    (floor,) = threshold_quality(held_out, images, [darkest])
    rows.append(["floor: darker than around", "1", *in_percent(floor), "0"])
    eye = photograph()
    save_png(picture(segmenters, held_out, size, eye), PICTURE, {"demo": "medical"})
    print(markdown_table([f"{len(images)} held-out drawings", "parameters", "Dice of vessels, %", "mDice, %", "mIoU, %",
                          "minutes"], rows))  # fmt: skip
    print(f"picture   {PICTURE}: the truth and what is found in drawings" + (
        "; with a photograph too after pip install 'd-emo[medical]'" if eye is None else ", and what in a photograph"
    ))  # fmt: skip


def in_percent(quality: Quality) -> list[str]:
    """Dice of the vessels, mean Dice and mean IoU."""
    return [f"{100 * value:.1f}" for value in (quality.dice[1] or 0.0, quality.mean_dice, quality.mean_iou)]


def darkness(image: Tensor) -> np.ndarray:
    """How much darker than around it the green of a pixel is, 0 at the edge. Shape: (3, H, W) uint8 -> (H, W)."""
    green, side = image[1].numpy().astype(np.float64), image.shape[1]
    inside = blurred((green > 25).astype(np.float64), side / 60) > 0.99
    return (blurred(green, side / 30) - blurred(green, side / 300)) * inside


def threshold_quality(images: LabelledImages, indices: Sequence[int], thresholds: Sequence[float]) -> list[Quality]:
    """How good it is to call a vessel what is darker than around it by more than each of some thresholds."""
    areas = [Areas(2) for _ in thresholds]
    for index in indices:
        image, truth = images[index]
        dark = torch.from_numpy(darkness(image))
        for each, threshold in zip(areas, thresholds, strict=True):
            each.add(dark > threshold, truth)
    return [Quality.of(each.sums) for each in areas]


def fitted_threshold(images: LabelledImages) -> int:
    """The best whole one, by Dice, on eight drawings to train on."""
    thresholds = range(1, 31)
    found = threshold_quality(images, range(8), thresholds)
    return max(thresholds, key=lambda each: found[each - 1].dice[1] or 0.0)


def picture(
    segmenters: dict[str, OpenSegmenter], held_out: LabelledImages, size: int, eye: np.ndarray | None
) -> Image.Image:
    """Drawings, their truth and both predictions; in the last row a photograph of a real eye, which has no truth.

    Shape: eye (H, W, 3) uint8.
    """
    rows = []
    for index in SHOWN:
        image, truth = held_out[index]
        predictions = [compared(found_in(each, image, size), truth.numpy()) for each in segmenters.values()]
        rows.append([image.permute(1, 2, 0).numpy(), compared(truth.numpy(), truth.numpy()), *predictions])
    if eye is not None:
        image = torch.from_numpy(eye.copy()).permute(2, 0, 1)  # scikit-image's is read-only
        found = [found_in(each, image, size) for each in segmenters.values()]
        rows.append([eye, np.full_like(eye, 255), *(compared(each, each) for each in found)])
    titles = ["drawing" if eye is None else "drawing, photograph", "truth", *segmenters]
    rows = [[as_large(each) for each in row] for row in rows]
    return gallery(rows, titles, LEGEND, "" if eye is None else REMARK, across=1)


def as_large(picture: np.ndarray) -> np.ndarray:
    """A picture at `SIDE`. Shape: (H, W, 3) -> (SIDE, SIDE, 3) uint8."""
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def found_in(segmenter: OpenSegmenter, image: Tensor, size: int) -> np.ndarray:
    """The classes of an image's pixels, seen as large as the drawings are. Shape: (3, H, W) uint8 -> (H, W)."""
    model = segmenter.model.to(best_device())
    return segment(model, image, size, windows=segmenter.windows).argmax(dim=0).cpu().numpy()


def compared(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Vessels that are right, missed and not there, in colours. Shape: (H, W) twice -> (H, W, 3) uint8."""
    colours = np.zeros((*found.shape, 3), dtype=np.uint8)
    colours[(found == 1) & (truth == 1)] = FOUND
    colours[(found == 0) & (truth == 1)] = MISSED
    colours[(found == 1) & (truth == 0)] = FALSE
    return colours
