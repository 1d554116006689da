"""Stripes that lie or stand, drawn when asked for; ``--dataset stripes`` trains on them."""

import numpy as np
import torch

from d_emo.data import ClassImages
from d_emo.tables import DATASETS, DatasetRow


class Stripes(ClassImages):
    """Two classes of stripes of random width and phase. Shape: images (3, image_size, image_size) in [-1, 1]."""

    name, class_names = "stripes", ["lying", "standing"]

    def __init__(self, image_size: int = 64, *, split: str = "train", seed: int = 0, num_images: int = 10_000):
        self.image_size, self.num_images, self.seed = image_size, num_images, 2 * seed + (split == "test")

    def __len__(self) -> int:
        return self.num_images

    def label(self, index: int) -> int:
        return index % 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        waves, phase = np.random.default_rng([self.seed, index]).uniform((2, 0), (6, 1)).tolist()
        line = torch.sin(2 * torch.pi * (torch.linspace(0, waves, self.image_size) + phase))
        lying = line[None, :, None].expand(3, -1, self.image_size)
        return (lying if self.label(index) == 0 else lying.mT).contiguous(), self.label(index)


own = {"licence": "Stripes are drawn by a formula and bring none.", "drawn": True, "held_out": 200}
DATASETS.register(DatasetRow(name="stripes", title="Stripes", images=Stripes, num_classes=2, **own))
