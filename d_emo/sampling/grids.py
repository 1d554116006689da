"""Pictures of samples: grids, single files, the course of the denoising; each file carries its settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from d_emo.config import SampleSettings
from d_emo.data import to_uint8
from d_emo.errors import InputError
from d_emo.latents import Codec
from d_emo.models import Denoiser
from d_emo.sampling.sampler import decode, sample_images
from d_emo.sampling.schedulers import make_scheduler


def draw_grid(
    images: torch.Tensor, captions: Sequence[str], columns: int, *, scale: int = 1, names: Sequence[str] = (),
    text_size: int = 14,
) -> Image.Image:
    """One row of images per caption, the caption above its row.

    Args:
        images: Row by row. Shape: (len(captions) * columns, 3, H, W) uint8.
        scale: Times which they are enlarged.
        names: Of the columns, written once on top, in two lines where one would be too wide.
        text_size: In pixels.
    """
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    gap, bar, font = 4, text_size * 22 // 14, ImageFont.load_default(text_size)
    heads = [two_lines(name, lambda text: font.getlength(text) <= width) for name in names]
    header = max((len(head.splitlines()) for head in heads), default=0) * bar
    canvas = Image.new("RGB", (columns * (width + gap) + gap, header + len(captions) * (height + bar) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for column, head in enumerate(heads):
        for line, text in enumerate(head.splitlines()):
            middle = gap + column * (width + gap) + width / 2
            draw.text((middle, line * bar + 3), text, fill="black", font=font, anchor="ma")
    for row, caption in enumerate(captions):
        top = header + row * (height + bar)
        draw.text((gap, top + 3), caption, fill="black", font=font)
        for column in range(columns):
            pixels = images[row * columns + column].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + column * (width + gap), top + bar))
    return canvas


def two_lines(text: str, fits: Callable[[str], bool]) -> str:
    """A text as it is where it fits, else broken where its lines are most alike; what is still too wide is cut off."""
    words = text.split()
    if not fits(text) and len(words) > 1:
        breaks = [(" ".join(words[:count]), " ".join(words[count:])) for count in range(1, len(words))]
        text = "\n".join(min(breaks, key=lambda lines: max(map(len, lines))))
    lines = []
    for line in text.splitlines():
        kept = line
        while not fits(kept) and len(kept) > 1:
            kept = kept.rstrip("…")[:-1] + "…"
        lines.append(kept)
    return "\n".join(lines)


def free_path(wanted: str | None, default: str) -> Path:
    """The path asked for, or the default one, numbered if it is taken.

    Raises:
        InputError: The path asked for exists already.
    """
    if wanted is not None:
        if Path(wanted).exists():
            raise InputError(f"{wanted} exists already; choose another `output`")
        return Path(wanted)
    path, number = Path(default), 1
    while path.exists():
        number += 1
        path = Path(default).with_stem(f"{Path(default).stem}-{number}")
    return path


def save_png(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG that carries its settings as text under "d-emo".

    Raises:
        InputError: The file cannot be written.
    """
    info = PngInfo()
    info.add_text("d-emo", json.dumps(settings))
    _write(path, lambda: picture.save(path, format="PNG", pnginfo=info))


def save_pngs(
    images: torch.Tensor, folder: Path, labels: Sequence[int], seeds: Sequence[int], settings: dict[str, Any]
) -> list[Path]:
    """Write one PNG per image, named after its class and seed, with the settings that make it again.

    Shape: images (N, 3, H, W) uint8, with N labels and seeds.

    Raises:
        InputError: The files cannot be written.
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
        InputError: The file cannot be written.
    """
    durations = [120] * (len(frames) - 1) + [1500]  # milliseconds
    _write(path, lambda: frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0,
        comment=json.dumps(settings).encode(),
    ))


def _write(path: Path, write: Callable[[], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


class Trajectory:
    """Keeps the latents at evenly spread steps of the denoising; the last is always among them.

    Args:
        steps: Number of steps that the scheduler takes.
        keep: How many to keep.
    """

    def __init__(self, steps: int, keep: int = 12):
        keep = min(keep, steps)
        self.wanted = {round((number + 1) * steps / keep) - 1 for number in range(keep)}
        self.latents: dict[int, list[torch.Tensor]] = {}

    def __call__(self, index: int, latents: torch.Tensor) -> None:
        if index in self.wanted:
            self.latents.setdefault(index, []).append(latents.cpu())

    def images(self, codec: Codec, device: torch.device) -> torch.Tensor:
        """What the kept latents decode to. Shape: -> (kept steps, images, 3, H, W) uint8."""
        kept = [torch.cat(self.latents[index]) for index in sorted(self.latents)]
        return torch.stack([to_uint8(decode(codec, latents.to(device))).cpu() for latents in kept])


def preview_grid(
    path: Path, denoiser: Denoiser, *, scheduler_config: dict[str, Any], codec: Codec, class_names: Sequence[str],
    guidance_scale: float,
) -> None:
    """Write the sample grid of a training run: fixed classes and seeds, so that grids of different steps compare.

    Where the samples are not finite it says so and writes nothing.
    """
    count, columns = min(8, len(class_names)), 2  # few: a large model on a CPU must get through them
    classes = [index * len(class_names) // count for index in range(count)]
    labels = [label for label in classes for _ in range(columns)]
    batches = sample_images(
        denoiser, make_scheduler(None, scheduler_config), codec, labels, range(len(labels)),
        num_inference_steps=20, guidance_scale=guidance_scale,
    )
    try:
        images = torch.cat(list(batches))
    except InputError as error:  # values that are not finite: no reason to stop a training run
        print(f"no sample grid {path}: {error}", file=sys.stderr, flush=True)
        return
    draw_grid(images, [f"{label}: {class_names[label]}" for label in classes], columns).save(path)


def default_path(settings: SampleSettings, classes: Sequence[int]) -> str:
    """Where the pictures of a call of ``scripts/sample.py`` go when it does not say."""
    names = "-".join(map(str, classes[:10]))
    kind = "interpolate" if settings.interpolate else "trajectory" if settings.trajectory else "class"
    kind = "guidance" if len(settings.guidance_scale) > 1 else kind
    suffix = ".gif" if settings.trajectory == "gif" else ".png" if settings.format == "grid" else ""
    return f"samples/{kind}-{names}-seed{settings.seed}{suffix}"


def sweep_rows(drawn: Sequence[torch.Tensor], captions: Sequence[str], scales: Sequence[float]) -> tuple:
    """Order samples drawn at several guidance scales from the same noise: a row for each scale, class by class.

    Args:
        drawn: Samples of each scale, equally many for each caption. Shape: (N, 3, H, W) each.
        captions: One per class.
        scales: Guidance scales.

    Returns:
        Samples, Shape: (len(scales) N, 3, H, W), and the captions of their rows.
    """
    if len(scales) == 1:
        return drawn[0], captions
    by_class = torch.stack([images.unflatten(0, (len(captions), -1)) for images in drawn], dim=1)
    return by_class.flatten(0, 2), [f"{caption}, guidance {scale:g}" for caption in captions for scale in scales]


def save_samples(
    output: Path, images: torch.Tensor, frames: torch.Tensor | None, captions: Sequence[str], labels: Sequence[int],
    seeds: Sequence[int], settings: SampleSettings, made_by: dict[str, Any],
) -> None:
    """Write what ``scripts/sample.py`` was asked for: a grid, single PNGs, or the course of the denoising.

    Args:
        images: The samples, ``settings.num_images`` for each caption. Shape: (N, 3, H, W) uint8.
        frames: Pictures of the steps, for a trajectory. Shape: (steps, N, 3, H, W) uint8.
        made_by: Settings to write into the files.
    """
    scale, columns = max(1, 128 // images.shape[-1]), settings.num_images
    if frames is None and settings.format == "png":
        save_pngs(images, output, labels, seeds, made_by)
    elif frames is None:
        save_png(draw_grid(images, captions, columns, scale=scale), output, made_by)
    elif settings.trajectory == "gif":
        grids = [draw_grid(frame, captions, columns, scale=scale) for frame in frames]
        save_gif(grids, output, made_by)
    else:
        rows = [f"{captions[index // columns]}, seed {seed}" for index, seed in enumerate(seeds)]
        strip = frames.transpose(0, 1).flatten(0, 1)
        save_png(draw_grid(strip, rows, len(frames), scale=scale), output, made_by)
