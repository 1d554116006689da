"""Scanned digits that ship inside scikit-learn."""

import numpy as np
import torch
from PIL import Image

from d_emo.data.images import ClassImages, check_image_size, split_number, to_tensor


class Digits(ClassImages):
    """The 1,797 scanned 8 x 8 digits that ship inside scikit-learn, enlarged bicubically; every fifth is held out.

    Args:
        image_size: Side in pixels, at least 8.
        split: "train" (1,438 images) or "test" (359 images).
    """

    name = "digits"

    def __init__(self, image_size: int = 64, *, split: str = "train"):
        from sklearn.datasets import load_digits

        check_image_size(image_size)
        self.image_size = image_size
        self.class_names = [str(digit) for digit in range(10)]
        bunch = load_digits()
        held_out = np.arange(len(bunch.target)) % 5 == 4
        keep = held_out if split_number(split) else ~held_out
        self.labels = bunch.target[keep].astype(int)
        self.scans = (bunch.images[keep] * (255 / 16)).round().astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        size = (self.image_size, self.image_size)
        scan = Image.fromarray(self.scans[index]).resize(size, Image.Resampling.BICUBIC)
        return to_tensor(scan.convert("RGB")), self.label(index)
