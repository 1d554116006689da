"""Scanned digits on real textures: pictures with several objects, whose boxes and masks are known exactly."""

from functools import cache

import numpy as np
import torch
from PIL import Image

from d_emo.data.digits import Digits
from d_emo.data.images import check_image_size, split_number

MOST_DIGITS = 6
_TRIES = 20


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """The two photographs that ship inside scikit-learn. Shape: (427, 640, 3) uint8 each."""
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


class DigitScenes:
    """One to six of scikit-learn's scanned digits on a part of one of its two photographs, drawn when asked for.

    Digits are from 1/8 to 1/2 of the side high, of any colour that stands out, and do not overlap. Held-out scenes are
    made of held-out scans, on the right thirds of the photographs; those to train on, on the rest. A mask is where a
    digit's ink covers half or more of a pixel, and a box is the smallest around a mask.

    Args:
        image_size: Side of the square pictures in pixels, at least 32.
        num_images: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.
    """

    name = "digit-scenes"

    def __init__(self, image_size: int = 160, *, num_images: int = 2000, split: str = "train", seed: int = 0):
        check_image_size(image_size)
        self.image_size, self.num_images, self.seed, self._split = image_size, num_images, seed, split_number(split)
        self.scans = Digits(image_size, split=split)
        self.class_names = self.scans.class_names

    def __len__(self) -> int:
        return self.num_images

    def origin(self, index: int) -> str:
        """Where picture ``index`` comes from, for messages about it."""
        return f"image {index} of {self.name}"

    def read(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A picture and what is in it.

        Shape: (3, H, W) uint8; boxes (n, 4) as left, top, right, bottom, labels (n,), masks (n, H, W) uint8.
        """
        rng = np.random.Generator(np.random.Philox(key=[self.seed * 2 + self._split, int(index)]))
        picture = self._ground(rng)
        free = np.ones(picture.shape[:2], dtype=bool)
        masks, labels = [], []
        for _ in range(rng.integers(1, MOST_DIGITS + 1)):
            scan = int(rng.integers(len(self.scans)))
            side = int(self.image_size * 2 ** rng.uniform(-3, -1))
            enlarged = Image.fromarray(self.scans.scans[scan]).resize((side, side), Image.Resampling.BICUBIC)
            ink = np.asarray(enlarged) / 255
            colour = rng.uniform(0, 255, 3)
            for _ in range(_TRIES):
                top, left = rng.integers(0, self.image_size - side + 1, 2)
                place = (slice(top, top + side), slice(left, left + side))
                if free[place].all():
                    break
            else:
                continue
            free[place] = False
            below = picture[place].mean(axis=(0, 1))
            if np.abs(colour - below).max() < 96:  # the colour's opposite stands out
                colour = (colour + 128) % 256
            picture[place] += ink[..., None] * (colour - picture[place])
            mask = np.zeros(free.shape, dtype=np.uint8)
            mask[place] = ink >= 0.5
            masks.append(mask)
            labels.append(self.scans.label(scan))
        stacked = torch.from_numpy(np.stack(masks))
        pixels = torch.from_numpy(picture.round().clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous()
        return pixels, {"boxes": boxes_of(stacked), "labels": torch.tensor(labels), "masks": stacked}

    def _ground(self, rng: np.random.Generator) -> np.ndarray:
        """A square of a photograph, mirrored half the time. Shape: (image_size, image_size, 3), 0 to 255."""
        photographs_here = photographs()
        photograph = photographs_here[rng.integers(len(photographs_here))]
        edge = photograph.shape[1] * 2 // 3
        part = photograph[:, edge:] if self._split else photograph[:, :edge]
        side = int(rng.integers(64, min(part.shape[:2])))
        top, left = rng.integers(0, part.shape[0] - side), rng.integers(0, part.shape[1] - side)
        crop = Image.fromarray(part[top : top + side, left : left + side])
        ground = np.asarray(crop.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC), dtype=np.float64)
        return ground[:, :: 1 if rng.integers(2) else -1].copy()


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """The smallest boxes around masks that are not empty. Shape: (n, H, W) -> (n, 4) left, top, right, bottom."""
    edges = []
    for seen in (masks.amax(dim=1), masks.amax(dim=2)):  # (n, W), (n, H)
        first = seen.argmax(dim=1)
        edges.append((first, seen.shape[1] - seen.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()
