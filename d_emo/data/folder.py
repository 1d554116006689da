"""Image folders in ImageNet's layout."""

from pathlib import Path

from d_emo.data.images import check_image_size
from d_emo.data.reading import AS_VIEWED, Reading, image_endings, is_image
from d_emo.data.stored import StoredImages
from d_emo.errors import InputError


class ImageFolder(StoredImages):
    """Images in one sub-folder per class, as ImageNet is laid out; classes in the order of their folder names.

    Args:
        root: Folder of class folders.
        image_size: Side in pixels of the centre crop.
        skip_corrupt, reading: See `StoredImages`.
        one_class: All images below ``root``, in sub-folders or not, are one class, named after the folder.

    Raises:
        InputError: The folder is missing, has no class folders, or a class folder holds no image.
    """

    name = "folder"

    def __init__(
        self, root: str | Path, image_size: int = 256, *, skip_corrupt: bool = False, one_class: bool = False,
        reading: Reading = AS_VIEWED,
    ):  # fmt: skip
        check_image_size(image_size)
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"the data folder {root} does not exist; give a folder with one sub-folder per class")
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        folders = [root.resolve()] if one_class else folders
        if not folders:
            raise InputError(
                f"the data folder {root} has no sub-folders; put each class's images into one of its own, or (a "
                "denoiser) train with `unconditional`"
            )
        self.files: list[Path] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = sorted(path for path in folder.rglob("*") if is_image(path))
            if not found:
                raise InputError(f"the class folder {folder} holds no images ({', '.join(sorted(image_endings()))})")
            self.files += found
            labels += [label] * len(found)
        names = [folder.name for folder in folders]
        super().__init__(labels, names, image_size, skip_corrupt=skip_corrupt, reading=reading)

    def source(self, index: int) -> Path:
        return self.files[index]

    def origin(self, index: int) -> str:
        return str(self.files[index])
