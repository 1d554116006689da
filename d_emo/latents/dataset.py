"""Latents that were encoded before, read from disk as they are needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from d_emo.errors import InputError, RunError
from d_emo.latents.codec import Codec
from d_emo.latents.shards import Origin, ShardError, read_index, read_shard, repeat


class LatentDataset(Dataset):
    """What `encode` wrote: item i is (moments, label) of image i, always the same.

    The shards are mapped into memory, so the folder may be larger than it, and processes share what is read.

    Args:
        folder: The folder of shards and index.
        flip: Whether to give mirror images. Default: if they were encoded.

    Attributes:
        name, class_names, image_size, flip: As of the images. With ``flip`` the moments of the mirror image follow
            along the channels: a latent itself cannot be mirrored.
        exif, background: How the images were read, see `d_emo.data.Reading`.
        codec: Name of the codec at the time.

    Raises:
        InputError: The folder is missing, incomplete or damaged, or has no mirror images.
    """

    reading, left_out = None, ""  # no images are read

    def __init__(self, folder: str | Path, *, flip: bool | None = None):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.name, self.class_names = self.index["data"], self.index["class_names"]
        self.image_size, mirrored, self.codec = (self.index[key] for key in ("image_size", "mirrored", "codec"))
        self.exif, self.background = (self.index.get(key, getattr(Origin, key)) for key in ("exif", "background"))
        if flip and not mirrored:
            raise InputError(f"the latents in {folder} hold no mirror images (`flip`); encode again, with them")
        self.flip = mirrored and flip is not False
        self._only_plain = mirrored and not self.flip
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def check(self, codec: Codec, image_size: int, *, exif: bool | None = None, background: str | None = None) -> None:
        """Raise InputError for a codec, an image size or, where given, a way to read images that these latents are not
        of; names both values.
        """
        for key, given in (("exif", exif), ("background", background)):
            if given not in (None, getattr(self, key)):
                raise InputError(
                    f"the latents in {self.folder} are of images read with `{key}` {getattr(self, key)}, not {given}; "
                    "leave it away or encode again"
                )
        if image_size != self.image_size:
            raise InputError(
                f"the latents in {self.folder} are of {self.image_size} px images, not `image_size` {image_size}; "
                "leave it away or encode again"
            )
        if codec.fingerprint != self.index["encoder"]:
            raise InputError(
                f"the latents in {self.folder} are those of {self.codec} (encoder {self.index['encoder']}), not of "
                f"`vae` {codec.name} (encoder {codec.fingerprint}); name the same VAE or encode again"
            )
        for key in ("scaling", "shift"):
            if getattr(codec, key) != self.index[key]:
                raise InputError(
                    f"the latents in {self.folder} were made with {key} {self.index[key]}, but {codec.name} now has "
                    f"{key} {getattr(codec, key)}; name the same VAE or encode again"
                )

    def __len__(self) -> int:
        return self.index["images"]

    def source(self, index: int) -> Path:
        """The shard that image ``index`` is in."""
        return self.folder / self.index["shards"][index // self.index["shard_size"]]["file"]

    def label(self, index: int) -> int:
        shard, row = self._at(index)
        return int(shard["labels"][row])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shard, row = self._at(index)
        moments = shard["moments"][row]
        return moments.chunk(2)[0] if self._only_plain else moments, int(shard["labels"][row])

    def remarks(self, count: Callable[[torch.Tensor], Any] = torch.count_nonzero) -> list[str]:
        """As of images: nothing is done to latents."""
        return []

    def __getstate__(self) -> dict[str, Any]:  # a worker maps the files anew
        return {**self.__dict__, "_shards": {}}

    def _at(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, row = divmod(index, self.index["shard_size"])
        if number not in self._shards:
            self._shards[number] = self._open(self.index["shards"][number])
        return self._shards[number], row

    def _open(self, entry: dict[str, Any]) -> dict[str, torch.Tensor]:
        path = self.folder / entry["file"]
        try:
            _, tensors = read_shard(path)
        except (ShardError, RunError):
            raise InputError(f"the shard {path} cannot be read; {repeat()}") from None
        if list(tensors["moments"].shape) != [entry["images"], *self.index["moments_shape"]]:
            raise InputError(f"the shard {path} does not hold what the index says; {repeat()}")
        return tensors
