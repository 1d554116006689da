"""Image folders in ImageNet's layout."""

from collections.abc import Callable
from pathlib import Path

from d_emo.config import folder_of
from d_emo.data.images import check_image_size
from d_emo.data.listing import find_splits, list_files, list_folders
from d_emo.data.names import in_class_order
from d_emo.data.reading import AS_VIEWED, Reading, describe_left_out, is_image, no_images
from d_emo.data.stored import StoredImages
from d_emo.errors import InputError


class ImageFolder(StoredImages):
    """Images in one sub-folder per class, as ImageNet is laid out; classes as `in_class_order` has their names.

    Args:
        root: Folder of class folders; ``folder:`` before it says that folders called train, val, ... are classes.
        image_size: Side in pixels of the centre crop.
        skip_corrupt, reading: See `StoredImages`.
        one_class: All images below ``root``, in sub-folders or not, are one class, named after the folder.

    Raises:
        InputError: The folder is missing, has no class folders, or train, val, ... in their place; a class folder
            holds no image.
    """

    name, sorted_names = "folder", True

    def __init__(
        self, root: str | Path, image_size: int = 256, *, skip_corrupt: bool = False, one_class: bool = False,
        reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        check_image_size(image_size)
        self.files, names, others = class_files(root, one_class=one_class)
        ids = {name: label for label, name in enumerate(in_class_order(set(names)))}
        labels = [ids[name] for name in names]
        self.left_out = describe_left_out(others)
        super().__init__(labels, list(ids), image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> Path:
        return self.files[index]

    def origin(self, index: int) -> str:
        return str(self.files[index])


def class_files(
    data_dir: str | Path, *, is_wanted: Callable[[Path], bool] = is_image,
    none_wanted: Callable[[str, list[Path]], InputError] = no_images, one_class: bool = False,
) -> tuple[list[Path], list[str], list[Path]]:  # fmt: skip
    """The wanted files of a folder of class folders by their paths, the class of each, and the other files.

    Args:
        data_dir: The folder; ``folder:`` before it says that folders called train, val, ... are classes.
        is_wanted: Whether a file is data.
        none_wanted: The error of a class folder without any, of its name and files.
        one_class: All files below are of one class, named after the folder.

    Raises:
        InputError: See `ImageFolder`.
    """
    given, root = str(data_dir), folder_of(str(data_dir))
    folders = list_folders(root)
    if given == str(root) and (splits := find_splits(folders)):
        raise _holds_splits(root, *splits)
    folders = [root.resolve()] if one_class else folders
    if not folders:
        raise InputError(
            f"the data folder {root} has no sub-folders; put each class's images into one of its own, or (a "
            "denoiser) train with `unconditional`"
        )
    found: list[Path] = []
    names: list[str] = []
    others: list[Path] = []
    for folder in folders:  # by their paths, so that file i stays the same whatever the order of the classes
        files = list_files(folder)
        wanted = [path for path in files if is_wanted(path)]
        others += [path for path in files if not is_wanted(path)]
        if not wanted:
            raise none_wanted(f"the class folder {folder}", files)
        found += wanted
        names += [folder.name] * len(wanted)
    return found, names, others


def _holds_splits(root: Path, train: list[Path], held_out: list[Path]) -> InputError:
    """The error of a folder whose sub-folders are not classes but parts of a data set."""
    parts = train + held_out
    several = f" (or one folder of links to all of {', '.join(each.name for each in train)})" if len(train) > 1 else ""
    beside = f" with `validate_dir` {held_out[0]}" if train and held_out else ""
    return InputError(
        f"{root} holds {', '.join(each.name for each in parts)}, which are no classes; you probably meant `data_dir` "
        f"{parts[0]}{several}{beside}. If they are classes, write `data_dir` folder:{root}"
    )
