"""Image folders in ImageNet's layout, with the centre crop of ADM and DiT."""

import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from d_emo.config import folder_of
from d_emo.data.images import ClassImages, check_image_size, to_tensor
from d_emo.data.listing import find_splits, list_files, list_folders
from d_emo.errors import InputError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """Square centre crop as ADM and DiT prepare ImageNet: halve by box filter while twice too large, then bicubic.

    Raises:
        InputError: The image's shorter side is below ``image_size``.
    """
    if min(image.size) < image_size:
        raise InputError(f"the image is {image.width} x {image.height} px, smaller than the {image_size} px asked for")
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def load_image(
    source: Path | BytesIO, image_size: int, *, name: Callable[[], str] | None = None,
    crop: Callable[[Image.Image, int], Image.Image] = centre_crop,
) -> torch.Tensor:
    """Read and crop one image file.

    Args:
        source: The file, or its content.
        image_size: Side in pixels.
        name: Gives what to call the image in a message. Default: the file.
        crop: Makes a square image out of (RGB image, side).

    Returns:
        float32 in [-1, 1]. Shape: (3, image_size, image_size).

    Raises:
        InputError: The file cannot be read as an image or is too small; the sentence names it.
    """
    try:
        with Image.open(source) as image:
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = str(error) if isinstance(source, Path) else "not a readable image"
        raise InputError(
            f"cannot read the image {name() if name else source} ({reason}); repair or replace it"
        ) from None
    try:
        return to_tensor(crop(image, image_size))
    except InputError as error:
        raise InputError(f"{name() if name else source}: {error}") from None


class StoredImages(ClassImages):
    """Labelled images that are read from somewhere, some of which may be unreadable or too small.

    A kind of storage gives `load` and `origin`.

    Args:
        labels: Class id of each image.
        skip_corrupt: Take the next image in place of an unreadable or too small one, name and count it. None: stop
            at it, as with False, but do not speak of a flag that the script at work lacks.
    """

    flip = True

    def __init__(
        self, labels: Sequence[int], class_names: list[str], image_size: int, *, skip_corrupt: bool | None = False
    ):
        check_image_size(image_size)
        self.labels, self.class_names = labels, class_names
        self.image_size, self.skip_corrupt = image_size, skip_corrupt
        self.skipped = torch.zeros(len(labels), dtype=torch.bool).share_memory_()  # one count over all workers

    @abstractmethod
    def load(self, index: int) -> torch.Tensor:
        """Image ``index``, or an `InputError` that names it. Shape: (3, image_size, image_size)."""

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
                    raise InputError(f"{error}; `skip_corrupt` passes over such images") from None
                if not self.skipped[at]:
                    self.skipped[at] = True
                    print(f"skipped {self.origin(at)} ({int(self.skipped.sum())} so far)", file=sys.stderr, flush=True)
        raise InputError("none of the images could be read")


class ImageFolder(StoredImages):
    """Images in one sub-folder per class, as ImageNet is laid out; classes as `in_class_order` has their names.

    Args:
        root: Folder of class folders; ``folder:`` before it says that folders called train, val, ... are classes.
        image_size: Side in pixels of the centre crop.
        skip_corrupt: Take the next image in place of an unreadable or too small one, name and count it.
        one_class: All images below ``root``, in sub-folders or not, are one class, named after the folder.

    Raises:
        InputError: The folder is missing, has no class folders, or train, val, ... in their place; a class folder
            holds no image.
    """

    name = "folder"

    def __init__(self, root: str | Path, image_size: int = 256, *, skip_corrupt: bool = False, one_class: bool = False):
        check_image_size(image_size)
        given, root = str(root), folder_of(str(root))
        folders = list_folders(root)
        if given == str(root) and (splits := find_splits(folders)):
            raise _holds_splits(root, *splits)
        folders = [root.resolve()] if one_class else folders
        if not folders:
            raise InputError(
                f"the data folder {root} has no sub-folders; put each class's images into one of its own, or (a "
                "denoiser) train with `unconditional`"
            )
        self.files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = [path for path in list_files(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                raise InputError(f"the class folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            self.files += found
            labels += [label] * len(found)
        super().__init__(labels, [folder.name for folder in folders], image_size, skip_corrupt=skip_corrupt)

    def load(self, index: int) -> torch.Tensor:
        return load_image(self.files[index], self.image_size)

    def origin(self, index: int) -> str:
        return str(self.files[index])


def _holds_splits(root: Path, train: list[Path], held_out: list[Path]) -> InputError:
    """The error of a folder whose sub-folders are not classes but parts of a data set."""
    parts = train + held_out
    beside = f" with `validate_dir` {held_out[0]}" if train and held_out else ""
    return InputError(
        f"{root} holds {', '.join(each.name for each in parts)}, which are no classes; you probably meant `data_dir` "
        f"{parts[0]}{beside}. If they are classes, write `data_dir` folder:{root}"
    )
