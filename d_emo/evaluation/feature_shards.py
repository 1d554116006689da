"""Features of images drawn on the spot, in shards: many processes share the work and any can be stopped.

A shard is 256 consecutive images. Its features are one file that is written whole and last, with checksums of itself
and of the images beside it; the same call again makes only what is missing or damaged. Shard k is drawn by process
k % world_size, but nothing of its content depends on that: the numbers are the same for any number of processes. A
folder serves one command at a time.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from d_emo.errors import InputError, RunError
from d_emo.evaluation.features import FeatureExtractor
from d_emo.evaluation.npz import read_text, write_npz
from d_emo.files import digest, digest_of_file, digest_of_tensors, is_free, replacing, write_file

SHARD_SIZE = 256
SAMPLING_KEY, IDENTITY_KEY = "sampling", "identity"  # of an .npz: how its images were drawn, and a digest of it
CHECKSUMS = "sha256"
SETTINGS_FILE = "settings.json"

Generate = Callable[[int, int], Iterator[torch.Tensor]]
"""(first, last + 1) image -> batches of these images. Shape: (B, 3, H, W) uint8."""


class Ranks(NamedTuple):
    """Which of the processes that share the work this one is, and how it waits for the others."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None


ALONE = Ranks()


def draw_labels(mode: str, indices: range, *, seed: int, num_classes: int) -> list[int]:
    """Class ids of the images of these indices.

    ``random`` ones are uniform, from (seed, index) alone, as ADM's and DiT's numbers are measured; ``balanced`` ones
    are all classes in turn.

    Raises:
        InputError: There are no classes, or no such way to draw them.
    """
    if num_classes < 1:
        raise InputError("the snapshot names no classes; labels cannot be drawn")
    if mode == "balanced":
        return [index % num_classes for index in indices]
    if mode != "random":
        raise InputError(f"unknown `labels` {mode!r}; use random or balanced")
    draws = (np.random.Generator(np.random.Philox(key=[seed, index])) for index in indices)
    return [int(draw.integers(num_classes)) for draw in draws]


def digest_of_settings(settings: dict[str, Any]) -> str:
    """Twelve digits that change with any setting."""
    return digest(_as_json(settings))[:12]


def read_provenance(path: str | Path) -> dict[str, Any]:
    """How the images of a folder or an ``.npz`` file were drawn, if they were drawn here; else an empty dictionary."""
    path = Path(path)
    try:
        if path.is_dir():
            found = json.loads((path / SETTINGS_FILE).read_text())["sampling"]
        else:
            found = json.loads(read_text(path, SAMPLING_KEY) or "{}") if path.suffix.lower() == ".npz" else {}
    except Exception:  # of another program
        return {}
    return found if isinstance(found, dict) else {}


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for files that depend on ``settings`` only, or check that it is one.

    Raises:
        InputError: It holds something else, or files of other settings.
    """
    file, text = folder / SETTINGS_FILE, _as_json(settings)
    if file.is_file() and file.read_text() != text:
        raise InputError(f"{folder} holds images or features of other settings, see {file}; name another folder")
    if not file.is_file() and not is_free(folder):
        raise InputError(f"{folder} exists and is not overwritten; name another folder")
    try:
        for left in folder.glob(".tmp-*"):  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not file.is_file():
            write_file(file, text)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from None


class FeatureShards:
    """The files of one set of drawn images.

    Args:
        folder: Where features are kept, claimed for these settings.
        num_images: How many images the set has.
        layers: Length of each kind of features, by name.
        png_folder, keep_pixels: Where to write images as PNG too, and whether to keep them for `write_npz`.
    """

    def __init__(
        self, folder: Path, num_images: int, layers: dict[str, int], *, png_folder: Path | None = None,
        keep_pixels: bool = False,
    ):  # fmt: skip
        self.folder, self.num_images, self.layers = folder, num_images, layers
        self._png_folder, self._keep_pixels = png_folder, keep_pixels
        starts = range(0, num_images, SHARD_SIZE)
        self._shards = [range(first, min(first + SHARD_SIZE, num_images)) for first in starts]
        self._complete: set[int] = set()  # shards that were found or made so

    def missing(self, ranks: Ranks = ALONE) -> list[range]:
        """The shards of a process that are not there yet; of all processes by default."""
        return [shard for shard in self._shards[ranks.rank :: ranks.world_size] if not self._is_complete(shard)]

    def write(
        self, generate: Generate, extractor: FeatureExtractor, ranks: Ranks, *, device: torch.device | str,
        progress: bool = True,
    ) -> float | None:
        """Draw what is missing of this process's shards, and wait for the others.

        Returns:
            Images per second of all processes together, or None if there was nothing to do.
        """
        mine = self.missing(ranks)
        count, started = sum(map(len, mine)), time.perf_counter()
        hidden = None if progress and ranks.rank == 0 else True  # None: shown on a terminal only
        with tqdm(total=count * ranks.world_size, desc="drawing", unit="image", disable=hidden, leave=False) as bar:
            for shard in mine:
                features, pixels = [], []
                for images in generate(shard.start, shard.stop):
                    extracted = extractor.extract(images.to(device))
                    features.append({name: layer.float().cpu() for name, layer in extracted.items()})
                    pixels.append(images.cpu() if self._png_folder or self._keep_pixels else images[:, :, :0])
                    bar.update(len(images) * ranks.world_size)
                self._write_shard(shard, features, torch.cat(pixels))
        seconds = time.perf_counter() - started
        ranks.wait()
        return count * ranks.world_size / seconds if count else None

    def read(self, device: torch.device | str = "cpu") -> Iterator[dict[str, torch.Tensor]]:
        """All features in the order of their images, a shard at a time. Shape of a layer: (B, dim) float32."""
        for shard in self._shards:
            yield load_file(self._file(shard), device=str(device))

    def write_npz(self, path: Path, image_size: tuple[int, int], sampling: dict[str, Any], identity: str) -> None:
        """Collect the images into an ``.npz`` file in ADM's layout, with how they were drawn."""
        pixels = (torch.from_numpy(np.load(self._pixel_file(shard))) for shard in self._shards)
        about = {SAMPLING_KEY: json.dumps(sampling), IDENTITY_KEY: identity}
        write_npz(path, pixels, self.num_images, image_size, lambda: about)

    def drop_pixels(self) -> None:
        """Delete the images kept for `write_npz`."""
        for file in self.folder.glob("pixels-*.npy"):
            file.unlink()

    def _write_shard(self, shard: range, features: list[dict[str, torch.Tensor]], pixels: torch.Tensor) -> None:
        """Features last: their file says that the shard is complete."""
        joined = {name: torch.cat([each[name] for each in features]).contiguous() for name in self.layers}
        if any(len(layer) != len(shard) for layer in joined.values()):
            raise ValueError(f"images {shard.start} to {shard.stop - 1} were to be drawn, but {len(pixels)} came")
        if not all(layer.isfinite().all() for layer in joined.values()):
            raise InputError(
                f"the features of images {shard.start} to {shard.stop - 1} hold NaN or infinite values; the weights of "
                "the feature network are damaged"
            )
        if self._png_folder:
            for index, image in zip(shard, pixels, strict=True):
                picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
                _write(self._png(index), lambda file, picture=picture: picture.save(file, format="PNG"), flush=False)
        if self._keep_pixels:
            _write(self._pixel_file(shard), lambda file: np.save(file, pixels.numpy()))
        earlier = self._read(shard)[1]
        kept = {"pngs": earlier["pngs"]} if "pngs" in earlier else {}  # of a command that wanted them
        checksums = {**kept, "features": digest_of_tensors(joined.items()), **self._images_there(shard)}
        _write(self._file(shard), lambda file: save_file(joined, file, metadata={CHECKSUMS: json.dumps(checksums)}))
        self._complete.add(shard.start)

    def _is_complete(self, shard: range) -> bool:
        """Whether features, and the images that are wanted, are there and match their checksums."""
        if shard.start in self._complete:
            return True
        found, checksums = self._read(shard)
        if {name: list(layer.shape) for name, layer in found.items()} != {
            name: [len(shard), dim] for name, dim in self.layers.items()
        }:
            return False
        try:
            wanted = {"features": digest_of_tensors(found.items()), **self._images_there(shard)}
        except FileNotFoundError:
            return False
        if wanted.items() <= checksums.items():
            self._complete.add(shard.start)
        return shard.start in self._complete

    def _read(self, shard: range) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Features and checksums as a file has them; nothing where it is missing or damaged."""
        try:
            with safe_open(self._file(shard), framework="pt") as file:
                found = {name: file.get_tensor(name) for name in self.layers}
                return found, dict(json.loads((file.metadata() or {})[CHECKSUMS]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return {}, {}

    def _images_there(self, shard: range) -> dict[str, str]:
        """Checksums of the images that are written beside the features."""
        found = {"pixels": digest_of_file(self._pixel_file(shard))} if self._keep_pixels else {}
        if self._png_folder:
            found["pngs"] = digest(*(self._png(index).read_bytes() for index in shard))
        return found

    def _file(self, shard: range) -> Path:
        return self.folder / f"features-{shard.start:07d}.safetensors"

    def _pixel_file(self, shard: range) -> Path:
        return self.folder / f"pixels-{shard.start:07d}.npy"

    def _png(self, index: int) -> Path:
        return self._png_folder / f"{index:06d}.png"


def _write(path: Path, write: Callable[[Path], Any], *, flush: bool = True) -> None:
    """Write a file, all or nothing; a full disk, say, is a `RunError`."""
    try:
        with replacing(path, flush=flush) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"cannot write {path}: {reason}; re-run the same command to resume") from error


def _as_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=1, sort_keys=True, default=str) + "\n"
