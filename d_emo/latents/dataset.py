"""Latents that were encoded before, read from disk as they are needed."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from d_emo.errors import InputError, RunError
from d_emo.latents.codec import Codec
from d_emo.latents.shards import REPEAT, ShardError, read_index, read_shard


class LatentDataset(Dataset):
    """What `encode` wrote: item i is (moments, label) of image i, always the same.

    The shards are mapped into memory, so the folder may be larger than it, and processes share what is read.

    Args:
        folder: The folder of shards and index.

    Attributes:
        name, class_names, image_size, flip: As of the images. With ``flip`` the moments of the mirror image follow
            along the channels: a latent itself cannot be mirrored.
        codec: Name of the codec at the time.

    Raises:
        InputError: The folder is missing, incomplete or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.name, self.class_names = self.index["data"], self.index["class_names"]
        self.image_size, self.flip, self.codec = (self.index[key] for key in ("image_size", "mirrored", "codec"))
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def check(self, codec: Codec, image_size: int) -> None:
        """Raise InputError for a codec or an image size that these latents are not of; names both values."""
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

    def label(self, index: int) -> int:
        shard, row = self._at(index)
        return int(shard["labels"][row])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shard, row = self._at(index)
        return shard["moments"][row], int(shard["labels"][row])

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
            raise InputError(f"the shard {path} cannot be read; {REPEAT}") from None
        if list(tensors["moments"].shape) != [entry["images"], *self.index["moments_shape"]]:
            raise InputError(f"the shard {path} does not hold what the index says; {REPEAT}")
        return tensors
