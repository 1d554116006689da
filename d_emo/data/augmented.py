"""Image folders as classifiers want them: random crops and RandAugment to train, the usual centre crop to measure."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from d_emo.data.folder import ImageFolder
from d_emo.data.reading import AS_VIEWED, Reading
from d_emo.errors import InputError

GREY = (124, 116, 104)
"""ImageNet's mean colour, for what RandAugment uncovers."""


@contextlib.contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Inside, Python's and numpy's global generators start from ``seed``; timm's transforms use both of them."""
    before = random.getstate(), np.random.get_state()
    state = np.random.SeedSequence(seed).generate_state(2)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep ``bits`` bits of every channel. The strongest setting keeps none, which newer versions of Pillow refuse."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return ImageOps.posterize(image, bits) if bits < 8 else image


def random_change(
    image_size: int, crop_scale: Sequence[float], rand_augment: str | None
) -> Callable[[Image.Image], Image.Image]:
    """A random resized crop, then RandAugment, by Python's and numpy's global generators.

    Args:
        image_size: Side of the crop.
        crop_scale, rand_augment: See `AugmentedFolder`.

    Raises:
        InputError: A policy that timm does not know.
    """
    from timm.data.auto_augment import rand_augment_transform  # heavy, and needed for no other data
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import Compose

    crop = RandomResizedCropAndInterpolation(image_size, scale=tuple(crop_scale), interpolation="bicubic")
    if rand_augment is None:
        return crop
    settings = {"translate_const": int(image_size * 0.45), "img_mean": GREY}
    settings["interpolation"] = Image.Resampling.BICUBIC
    try:
        policy = rand_augment_transform(rand_augment, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"timm knows no RandAugment policy {rand_augment!r}; the paper's is 'rand-m9-mstd0.5-inc1'"
        ) from error
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize
    return Compose([crop, policy])


class AugmentedFolder(ImageFolder):
    """Training images: a random resized crop, then RandAugment.

    What is drawn depends on (seed, epoch, index) alone, so neither workers nor a resumed run change it.

    Args:
        root, image_size, skip_corrupt, reading: see `ImageFolder`.
        crop_scale: smallest and largest share of the image's area in a crop.
        rand_augment: timm's name of a policy, e.g. "rand-m9-mstd0.5-inc1", or None for none.
        seed: seed of all draws.

    Raises:
        InputError: a policy that timm does not know, or see `ImageFolder`.
    """

    def __init__(
        self, root: str | Path, image_size: int, *, crop_scale: Sequence[float], rand_augment: str | None, seed: int,
        skip_corrupt: bool = False, reading: Reading = AS_VIEWED,
    ) -> None:  # fmt: skip
        super().__init__(root, image_size, skip_corrupt=skip_corrupt, reading=reading)
        self.seed, self.change = seed, random_change(image_size, crop_scale, rand_augment)

    def crop(self, image: Image.Image, index: int) -> Image.Image:
        """A random crop of image ``index``, under the policy."""
        with seeded(self.seed, getattr(index, "epoch", 0), int(index)):
            return self.change(image)


class CentreCroppedFolder(ImageFolder):
    """Images for measuring: the shorter side resized to ``image_size / crop_share``, then the centre cut out.

    Args:
        root, image_size, skip_corrupt, reading: see `ImageFolder`.
        crop_share: side of the crop over the shorter side of the image; timm's ``crop_pct``.
    """

    def __init__(
        self, root: str | Path, image_size: int, *, crop_share: float, skip_corrupt: bool = False,
        reading: Reading = AS_VIEWED,
    ) -> None:  # fmt: skip
        super().__init__(root, image_size, skip_corrupt=skip_corrupt, reading=reading)
        self.shorter = round(image_size / crop_share)

    def crop(self, image: Image.Image, index: int) -> Image.Image:
        """The square in the middle of an image, as classifiers are measured."""
        image_size, scale = self.image_size, self.shorter / min(image.size)
        width, height = (max(image_size, round(n * scale)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        return image.crop((left, top, left + image_size, top + image_size))
