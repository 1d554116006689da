"""Moving digits: videos whose class is the motion, which no single frame tells."""

import numpy as np
import torch
from PIL import Image

from d_emo.data.digits import Digits
from d_emo.data.images import ClassImages, check_image_size, split_number

MOTIONS = {
    "right": (1, 0, 0), "left": (-1, 0, 0), "down": (0, 1, 0), "up": (0, -1, 0),
    "clockwise": (0, 0, 1), "counterclockwise": (0, 0, -1),
}  # fmt: skip
"""Signs of the steps across, down and clockwise."""
SPEEDS = {"slow": 1, "fast": 3}
"""Eighths of the picture's side, or of a turn, from a frame to the next."""
DIGITS = (3, 4, 6, 7, 9)
"""Those that half a turn changes: of others, 3/8 clockwise would look like 1/8 counterclockwise."""

HELD_OUT = 480
"""Videos to measure on."""


class MovingDigits(ClassImages):
    """One of scikit-learn's scanned digits moves across, down or turns, slowly or fast: twelve motions.

    It leaves the picture on one side and comes back on the other. Scan, colours, first place and first angle are drawn
    alike for every motion, so that a frame by itself has the same distribution in all classes. So have the frames of
    eight without their order, in all motions along one axis: both speeds pass the same eight places. Held-out videos
    are made of held-out scans.

    Args:
        image_size: Side of the square videos in pixels, at least 16.
        frames: Of a video.
        num_videos: Length of the data set.
        split: "train" or "test".
        seed: Seed of the whole set.

    Shape: a video is (3, T, H, W) in [-1, 1].
    """

    name = "moving-digits"

    def __init__(
        self, image_size: int = 48, *, frames: int = 8, num_videos: int = 2000, split: str = "train", seed: int = 0
    ):
        check_image_size(image_size)
        self.image_size, self.frames, self.num_videos, self.seed = image_size, frames, num_videos, seed
        self._split, digits = split_number(split), Digits(image_size, split=split)
        self.scans = digits.scans[np.isin(digits.labels, DIGITS)]
        self.class_names = [f"{motion}, {speed}" for motion in MOTIONS for speed in SPEEDS]

    def __len__(self) -> int:
        return self.num_videos

    def label(self, index: int) -> int:
        return int(index) % len(self.class_names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        motion, speed = self.class_names[self.label(index)].split(", ")
        return self.draw(index, np.array(MOTIONS[motion]) * SPEEDS[speed]), self.label(index)

    def draw(self, index: int, steps: np.ndarray) -> torch.Tensor:
        """Video ``index`` with a motion, in eighths across, down and clockwise a frame. Shape: -> (3, T, H, W)."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed * 2 + self._split, int(index)]))
        size, side = self.image_size, self.image_size // 2
        scan = Image.fromarray(self.scans[rng.integers(len(self.scans))])
        digit = Image.new("L", (size, size))
        digit.paste(scan.resize((side, side), Image.Resampling.BICUBIC), ((size - side) // 2,) * 2)
        first = rng.random(3)  # place and angle, as shares of the side and of a turn
        ground, colour = rng.uniform(0, 90, 3), rng.uniform(150, 255, 3)
        video = np.empty((3, self.frames, size, size), dtype=np.float32)
        for t in range(self.frames):
            across, down, turned = first + t * steps / 8
            ink = np.asarray(digit.rotate(-360 * turned, Image.Resampling.BICUBIC)) / 255
            ink = np.roll(ink, (round(down * size), round(across * size)), axis=(0, 1))
            video[:, t] = (ground + ink[..., None] * (colour - ground)).transpose(2, 0, 1)
        return torch.from_numpy(video).div_(127.5).sub_(1)


def held_out_digits(image_size: int, frames: int) -> MovingDigits:
    """The videos that networks are measured on, the same for all."""
    return MovingDigits(image_size, frames=frames, num_videos=HELD_OUT, split="test")
