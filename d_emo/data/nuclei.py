"""A fluorescence micrograph with a mask of each nucleus, which ships inside the package stardist."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d_emo.data.images import check_image_size, split_number
from d_emo.data.reading import naming
from d_emo.data.scenes import boxes_of
from d_emo.errors import InputError

SIDE = 128
"""Of the squares that pictures are made of, and width of the strip that is held out, in pixels of the micrograph."""


def micrograph() -> tuple[np.ndarray, np.ndarray]:
    """The image, and at each pixel the number of its nucleus or 0. Shape: (512, 512) uint8, (512, 512) int32.

    Source: Caicedo et al., Nature Methods 16 (2019), image of the 2018 Data Science Bowl; 125 nuclei.

    Raises:
        InputError: stardist is not installed, or its files cannot be read.
    """
    package = find_spec("stardist")
    if package is None:
        raise InputError(
            "`dataset` nuclei is read from the package stardist: pip install --no-deps stardist (3 MB; nothing of it "
            "is run)"
        )
    read = []
    for name in ("img2d.tif", "mask2d.tif"):
        file = Path(package.submodule_search_locations[0]) / "data" / "images" / name
        with naming(lambda file=file: str(file)), Image.open(file) as image:
            read.append(np.asarray(image).astype(np.int32))
    pixels, nuclei = read
    return (pixels * 255 // max(1, pixels.max())).astype(np.uint8), nuclei


class Nuclei:
    """Squares of 128 px of the micrograph, resized; what lies in the right 128 px of it is held out.

    A square to train on lies anywhere in the rest, and those to measure on lie one below the other. What a square cuts
    off of a nucleus is left out of its mask and box.

    Args:
        image_size: Side of the pictures in pixels.
        num_images: Length of the data set; of what is held out there are only as many squares as fit, four.
        split: "train" or "test".
        seed: Seed of the whole set.

    Raises:
        InputError: See `micrograph`.
    """

    name = "nuclei"

    def __init__(self, image_size: int = 160, *, num_images: int = 2000, split: str = "train", seed: int = 0):
        check_image_size(image_size)
        self.image_size, self.seed, self.held_out = image_size, seed, bool(split_number(split))
        self.class_names = ["nucleus"]
        pixels, nuclei = micrograph()
        part = slice(-SIDE, None) if self.held_out else slice(0, -SIDE)
        self.pixels, self.nuclei = pixels[:, part], nuclei[:, part]
        self.num_images = min(num_images, len(pixels) // SIDE) if self.held_out else num_images

    def __len__(self) -> int:
        return self.num_images

    def source(self, index: int) -> None:
        """The file of square ``index``: it has none of its own."""

    def origin(self, index: int) -> str:
        """Where picture ``index`` comes from, for messages about it."""
        return f"square {index} of {self.name}"

    def read(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A picture and what is in it.

        Shape: (3, H, W) uint8; boxes (n, 4) as left, top, right, bottom, labels (n,), masks (n, H, W) uint8.
        """
        rng = np.random.Generator(np.random.Philox(key=[self.seed, int(index)]))
        top, left = index * SIDE, 0
        if not self.held_out:
            top, left = (int(rng.integers(side - SIDE + 1)) for side in self.pixels.shape)
        place, size = (slice(top, top + SIDE), slice(left, left + SIDE)), (self.image_size, self.image_size)
        grey = Image.fromarray(self.pixels[place]).resize(size, Image.Resampling.BICUBIC)
        nuclei = torch.from_numpy(np.array(Image.fromarray(self.nuclei[place]).resize(size, Image.Resampling.NEAREST)))
        numbers = nuclei.unique()
        masks = (nuclei == numbers[numbers > 0][:, None, None]).to(torch.uint8)
        pixels = torch.from_numpy(np.array(grey)).expand(3, -1, -1).contiguous()
        return pixels, {"boxes": boxes_of(masks), "labels": torch.zeros(len(masks), dtype=torch.long), "masks": masks}
