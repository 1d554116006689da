"""Files of pictures: where they go, and the settings that each carries."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from d_emo.errors import FULL, InputError, RunError
from d_emo.files import replacing


def save_png(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG that carries its settings as text under "d-emo".

    Raises:
        InputError, RunError: The file cannot be written; there is no room left for it.
    """
    info = PngInfo()
    info.add_text("d-emo", json.dumps(settings))
    _write(path, lambda file: picture.save(file, format="PNG", pnginfo=info))


def save_pngs(
    images: torch.Tensor, folder: Path, labels: Sequence[int], seeds: Sequence[int], settings: dict[str, Any]
) -> list[Path]:
    """Write one PNG per image, named after its class and seed, with the settings that make it again.

    Shape: images (N, 3, H, W) uint8, with N labels and seeds.

    Raises:
        InputError, RunError: As of `save_png`.
    """
    paths = []
    for image, label, seed in zip(images, labels, seeds, strict=True):
        paths.append(folder / f"class-{label}_seed-{seed}.png")
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        save_png(picture, paths[-1], {**settings, "classes": [label], "num_images": 1, "seed": seed})
    return paths


def save_gif(frames: Sequence[Image.Image], path: Path, settings: dict[str, Any]) -> None:
    """Write frames as a GIF that repeats, the last one held; its comment carries the settings.

    Raises:
        InputError, RunError: The file cannot be written; there is no room left for it.
    """
    durations = [120] * (len(frames) - 1) + [1500]  # milliseconds
    _write(path, lambda file: frames[0].save(
        file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0,
        comment=json.dumps(settings).encode(),
    ))


def _write(path: Path, write: Callable[[Path], None]) -> None:
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    try:
        with replacing(path) as temporary:
            write(temporary)
    except OSError as error:
        kind = RunError if error.errno in FULL else InputError
        raise kind(f"cannot write {path}: {error.strerror or error}") from None
