"""Pictures with several objects whose boxes and masks are known exactly: scanned digits on photographs, and shapes."""

from functools import cache

import numpy as np
import torch
from PIL import Image

from d_emo.data.digits import Digits
from d_emo.data.images import ClassImages, check_image_size, split_number, to_uint8
from d_emo.data.shapes import COLOURS, GROUNDS, REACH, SHAPES, ShapeScene, draw_scenes

MOST_DIGITS = MOST_SHAPES = 6
_TRIES = 20


@cache
def photographs() -> tuple[np.ndarray, ...]:
    """The two photographs that ship inside scikit-learn. Shape: (427, 640, 3) uint8 each."""
    from sklearn.datasets import load_sample_images

    return tuple(load_sample_images().images)


class DrawnPictures:
    """Pictures that are drawn when asked for, each by draws of its own.

    Args:
        image_size: Side of the square pictures in pixels, at least 8.
        num_images: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.
    """

    name: str

    def __init__(self, image_size: int, num_images: int, split: str, seed: int):
        check_image_size(image_size)
        self.image_size, self.num_images, self.seed, self._split = image_size, num_images, seed, split_number(split)

    def __len__(self) -> int:
        return self.num_images

    def source(self, index: int) -> None:
        """The file of picture ``index``: there is none."""

    def origin(self, index: int) -> str:
        """Where picture ``index`` comes from, for messages about it."""
        return f"image {index} of {self.name}"

    def draws(self, index: int, *, kind: int = 0) -> np.random.Generator:
        """What picture ``index`` is drawn by; pictures of another ``kind`` have others."""
        return np.random.Generator(np.random.Philox(key=[2**32 * kind + self.seed * 2 + self._split, int(index)]))


class DigitScenes(DrawnPictures):
    """One to six of scikit-learn's scanned digits on a part of one of its two photographs, drawn when asked for.

    Digits are from 1/8 to 1/2 of the side high, of any colour that stands out, and do not overlap. Held-out scenes are
    made of held-out scans, on the right thirds of the photographs; those to train on, on the rest. A mask is where a
    digit's ink covers half or more of a pixel, and a box is the smallest around a mask.

    Args:
        image_size: Side of the square pictures in pixels, at least 32.
        num_images: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.
        most: Digits of a picture, at most.
        heights: Least and largest height of a scan, as powers of two of the picture's side.
        grounds: Least and largest side of the part of a photograph, in its pixels; never more than there is.
    """

    name = "digit-scenes"

    def __init__(
        self, image_size: int = 160, *, num_images: int = 2000, split: str = "train", seed: int = 0,
        most: int = MOST_DIGITS, heights: tuple[float, float] = (-3, -1), grounds: tuple[int, int] = (64, 427),
    ):  # fmt: skip
        self.most, self.heights, self.grounds = most, heights, grounds
        super().__init__(image_size, num_images, split, seed)
        self.scans = Digits(image_size, split=split)
        self.class_names = self.scans.class_names

    def read(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A picture and what is in it.

        Shape: (3, H, W) uint8; boxes (n, 4) as left, top, right, bottom, labels (n,), masks (n, H, W) uint8.
        """
        rng = self.draws(index)
        picture = self._ground(rng)
        free = np.ones(picture.shape[:2], dtype=bool)
        masks, labels = [], []
        for _ in range(rng.integers(1, self.most + 1)):
            scan = int(rng.integers(len(self.scans)))
            side = int(self.image_size * 2 ** rng.uniform(*self.heights))
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
        least, largest = self.grounds
        side = int(rng.integers(least, min(largest, *part.shape[:2])))
        top, left = rng.integers(0, part.shape[0] - side), rng.integers(0, part.shape[1] - side)
        crop = Image.fromarray(part[top : top + side, left : left + side])
        ground = np.asarray(crop.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC), dtype=np.float64)
        return ground[:, :: 1 if rng.integers(2) else -1].copy()


class LargeDigitScenes(DigitScenes):
    """`DigitScenes` of one or two digits that are from 3/8 to 4/5 of the side high: for short runs on small pictures.

    At 64 px a digit is as large, and the ground as coarse, as in a scene of 128 px with digits of middle size.
    """

    name = "large-digit-scenes"

    def __init__(self, image_size: int = 64, *, num_images: int = 2000, split: str = "train", seed: int = 0):
        super().__init__(
            image_size, num_images=num_images, split=split, seed=seed, most=2, heights=(-1.4, -0.3), grounds=(32, 213)
        )


class DigitsOnPhotographs(ClassImages):
    """One digit of `DigitScenes` a picture, from half of its side to all of it high: what a classifier can learn from.

    The ground is as coarse as behind such a digit in a scene four times as wide.

    Args:
        image_size: Side of the square pictures in pixels, at least 8.
        num_images: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.
    """

    name = "digits-on-photographs"

    def __init__(self, image_size: int = 64, *, num_images: int = 20_000, split: str = "train", seed: int = 0):
        self.scenes = DigitScenes(
            image_size, num_images=num_images, split=split, seed=seed, most=1, heights=(-1, 0), grounds=(16, 107)
        )
        self.image_size, self.seed, self.class_names = image_size, seed, self.scenes.class_names

    def __len__(self) -> int:
        return len(self.scenes)

    def label(self, index: int) -> int:
        return int(self.scenes.read(index)[1]["labels"][0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels, objects = self.scenes.read(index)
        return pixels.float().div_(127.5).sub_(1), int(objects["labels"][0])


class ShapeScenes(DrawnPictures):
    """One to six shapes of Shapes-1000 on one of its grounds, drawn when asked for; the ten shapes are the classes.

    Radii are from 1/32 to 2/5 of the side, evenly on a logarithmic scale, so that at 512 px COCO's small, medium and
    large objects are all there. Shapes do not overlap, and none leaves the picture. A mask is where a shape covers half
    or more of a pixel, and a box is the smallest around a mask.

    Args:
        image_size: Side of the square pictures in pixels, at least 32.
        num_images: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.
    """

    name = "shape-scenes"
    radii = (1 / 16, 4 / 5)
    """Smallest and largest radius, as shares of half of the side."""

    def __init__(self, image_size: int = 160, *, num_images: int = 2000, split: str = "train", seed: int = 0):
        super().__init__(image_size, num_images, split, seed)
        self.class_names = list(SHAPES)

    def scenes(self, index: int) -> list[ShapeScene]:
        """The shapes of picture ``index``, the largest first; ground and light are those of the first."""
        rng = self.draws(index)
        ground = int(rng.integers(len(GROUNDS)))
        light = rng.uniform(0.88, 1.02), rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.12)
        placed: list[ShapeScene] = []
        for radius in sorted(np.exp(rng.uniform(*np.log(self.radii), rng.integers(1, MOST_SHAPES + 1))), reverse=True):
            for _ in range(_TRIES):
                x, y = rng.uniform(REACH * radius - 1, 1 - REACH * radius, 2)
                if all(np.hypot(x - one.x, y - one.y) > REACH * (radius + one.radius) for one in placed):
                    kind, angle = rng.integers((len(SHAPES), len(COLOURS))).tolist(), rng.uniform(0, 2 * np.pi)
                    placed.append(ShapeScene(*kind, ground, x, y, radius, angle, *light))
                    break
        return placed

    def read(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A picture and what is in it.

        Shape: (3, H, W) uint8; boxes (n, 4) as left, top, right, bottom, labels (n,), masks (n, H, W) uint8.
        """
        scenes = self.scenes(index)
        rgb, covered = draw_scenes(scenes, self.image_size)
        masks, labels = torch.from_numpy(covered), torch.tensor([scene.shape for scene in scenes])
        seen = masks.flatten(1).amax(dim=1) > 0  # a bar of a pixel's width covers none to a half
        masks, labels = masks[seen], labels[seen]
        pixels = to_uint8(torch.from_numpy(rgb).permute(2, 0, 1))
        return pixels, {"boxes": boxes_of(masks), "labels": labels, "masks": masks}


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """The smallest boxes around masks that are not empty. Shape: (n, H, W) -> (n, 4) left, top, right, bottom."""
    edges = []
    for seen in (masks.amax(dim=1), masks.amax(dim=2)):  # (n, W), (n, H)
        first = seen.argmax(dim=1)
        edges.append((first, seen.shape[1] - seen.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()
