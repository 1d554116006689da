"""Images that are read from files, whatever keeps the files."""

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from d_emo.data.images import ClassImages, check_image_size, to_tensor
from d_emo.data.names import check_class_names
from d_emo.data.reading import AS_VIEWED, Reading, centre_crop
from d_emo.errors import InputError


def load_image(
    source: Path | BytesIO, image_size: int, *, name: Callable[[], str] | None = None,
    crop: Callable[[Image.Image, int], Image.Image] = centre_crop, reading: Reading = AS_VIEWED,
) -> torch.Tensor:  # fmt: skip
    """Read and crop one image file.

    Args:
        source: The file, or its content.
        image_size: Side in pixels.
        name: Gives what to call the image in a message. Default: the file.
        crop: Makes a square image out of (RGB image, side).
        reading: How it becomes RGB.

    Returns:
        float32 in [-1, 1]. Shape: (3, image_size, image_size).

    Raises:
        InputError: The file cannot be read as an image; the sentence names it.
    """
    name = name or (lambda: str(source))
    image = reading.read(source, name)
    try:
        return to_tensor(crop(image, image_size))
    except InputError as error:
        raise InputError(f"cannot use the image {name()} ({error}); repair or replace it") from None


class StoredImages(ClassImages):
    """Labelled images that are read from somewhere, some of which may be unreadable.

    A kind of storage gives `source` and `origin`.

    Args:
        labels: Class id of each image.
        skip_corrupt: Take the next image in place of an unreadable one, name and count it. None: stop at it, as with
            False, but do not speak of a flag that the script at work lacks.
        reading: How a stored picture becomes RGB.

    Attributes:
        unit: What one of them is called.
        enlarged, skipped: Which of the images were smaller than ``image_size``, and which were passed over, so far.
    """

    flip, unit = True, "image"

    def __init__(
        self, labels: Sequence[int], class_names: list[str], image_size: int, *, skip_corrupt: bool | None = False,
        reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        check_image_size(image_size)
        check_class_names(class_names)
        self.labels, self.class_names = labels, class_names
        self.image_size, self.skip_corrupt, self.reading = image_size, skip_corrupt, reading
        self.enlarged, self.skipped = torch.zeros(2, len(labels), dtype=torch.bool).share_memory_()  # over all workers

    @abstractmethod
    def source(self, index: int) -> Path | BytesIO:
        """The file of image ``index``, or its content."""

    def crop(self, image: Image.Image, index: int) -> Image.Image:
        """The square of ``image_size`` that is seen of image ``index``."""
        return centre_crop(image, self.image_size)

    def load(self, index: int) -> torch.Tensor:
        """Image ``index``, or an `InputError` that names it. Shape: (3, image_size, image_size)."""

        def crop(image: Image.Image, image_size: int) -> Image.Image:
            self.enlarged[index] = min(image.size) < image_size
            return self.crop(image, index)

        return load_image(
            self.source(index), self.image_size, name=partial(self.origin, index), crop=crop, reading=self.reading
        )

    def remarks(self, count: Callable[[torch.Tensor], Any] = torch.count_nonzero) -> list[str]:
        lines = []
        if enlarged := int(count(self.enlarged)):
            lines.append(f"enlarged  {enlarged:,} {self.unit}{'s' * (enlarged > 1)} smaller than {self.image_size} px")
        if skipped := int(count(self.skipped)):
            lines.append(f"skipped   {skipped:,} {self.unit}{'s' * (skipped > 1)} that cannot be read")
        return lines

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            at = (index + offset) % len(self)
            try:
                return self.load(at), self.label(at)
            except InputError as error:
                if self.skip_corrupt is None:
                    raise
                if not self.skip_corrupt:
                    raise InputError(f"{error}; `skip_corrupt` passes over such {self.unit}s") from None
                if not self.skipped[at]:
                    self.skipped[at] = True
                    print(f"skipped ({int(self.skipped.sum())} so far): {error}", file=sys.stderr, flush=True)
        raise InputError(f"none of the {self.unit}s could be read")
