"""From class labels and seeds to latents and pictures: guidance, schedulers, grids."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from d_emo.config import DEFAULT_SCHEDULERS, InputError
from d_emo.data import to_uint8
from d_emo.latents import Codec
from d_emo.models import Denoiser
from d_emo.objective import objective_of

# For each name: the objective it serves, the scheduler class, what it changes in the snapshot's noise schedule.
_SCHEDULERS: dict[str, tuple[str, type, dict[str, Any]]] = {
    "ddpm": ("eps", DDPMScheduler, {}),
    "ddim": ("eps", DDIMScheduler, {"timestep_spacing": "leading", "set_alpha_to_one": True}),
    "dpm++": ("eps", DPMSolverMultistepScheduler, {"variance_type": None, "algorithm_type": "dpmsolver++"}),
    "euler": ("flow", FlowMatchEulerDiscreteScheduler, {}),
    "heun": ("flow", FlowMatchHeunDiscreteScheduler, {}),
}


def make_scheduler(name: str | None, config: dict[str, Any]) -> Any:
    """A diffusers scheduler over a snapshot's noise schedule.

    Args:
        name: ``ddpm`` (uses a learned variance), ``ddim`` or ``dpm++`` for eps, ``euler`` or ``heun`` for flow; None
            takes the default of the snapshot's objective.
        config: The snapshot's ``scheduler_config``.

    Raises:
        InputError: There is no such scheduler, or it does not serve the snapshot's objective.
    """
    objective = objective_of(config)
    name = name or DEFAULT_SCHEDULERS[objective]
    if name not in _SCHEDULERS:
        raise InputError(f"unknown scheduler {name!r}; known are {', '.join(_SCHEDULERS)}")
    serves, scheduler_class, changes = _SCHEDULERS[name]
    if serves != objective:
        able = ", ".join(other for other, (served, *_) in _SCHEDULERS.items() if served == objective)
        raise InputError(
            f"--scheduler {name} serves the {serves} objective, but this snapshot was trained with {objective}; use "
            f"one of {able}"
        )
    return scheduler_class.from_config({**config, **changes})


def set_steps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> None:
    """Lay out the timesteps of so many denoising steps. Heun looks twice in every step but the last.

    Left alone, diffusers' Euler would spend the last of its steps on the last thousandth of the path; here all steps
    are equal. Heun's last step does so, being a plain Euler step there.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - index / steps for index in range(steps)], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


@torch.no_grad()
def sample(
    denoiser: Denoiser, scheduler: Any, class_labels: Sequence[int], seeds: Sequence[int], *,
    num_inference_steps: int, guidance_scale: float = 1.0, batch_size: int = 64,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[torch.Tensor]:
    """Denoise, in batches. All noise of an image comes from a generator of its own, seeded by its seed.

    Args:
        denoiser: In eval mode.
        scheduler: From :func:`make_scheduler`.
        class_labels: One class id per image.
        seeds: One seed per image.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none and costs one forward pass instead of two.
        batch_size: Images denoised at once.
        on_step: Called after every denoising step of a batch.

    Yields:
        Latents. Shape: (batch, C, h, w), float32 on the denoiser's device.
    """
    size, device = denoiser.config.sample_size, denoiser.device
    height, width = (size, size) if isinstance(size, int) else size
    shape = (denoiser.config.in_channels, height, width)
    learned_variance = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
    for start in range(0, len(seeds), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        labels = torch.tensor(class_labels[start : start + batch_size], device=device)
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        set_steps(scheduler, num_inference_steps, device)
        for t in scheduler.timesteps:  # every scheduler here starts from unit noise and takes latents as they are
            output = _guided(denoiser, latents, t, labels, guidance_scale)
            if not learned_variance:
                output = output[:, : shape[0]]
            latents = scheduler.step(output, t, latents, generator=generators).prev_sample
            on_step()
        yield latents


def _guided(denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """The denoiser's output with its prediction pushed away from that of the null class. Shape: as the output's."""
    if scale == 1:
        return denoiser(x.to(denoiser.dtype), timestep=t, class_labels=labels).sample.float()
    both = torch.cat([labels, torch.full_like(labels, denoiser.null_class)])
    output = denoiser(torch.cat([x, x]).to(denoiser.dtype), timestep=t, class_labels=both).sample.float()
    given, null = output.chunk(2)
    channels = denoiser.config.in_channels
    prediction = null[:, :channels] + scale * (given[:, :channels] - null[:, :channels])
    return torch.cat([prediction, given[:, channels:]], dim=1)


def sample_images(
    denoiser: Denoiser, scheduler: Any, codec: Codec, *args: Any, **kwargs: Any
) -> Iterator[torch.Tensor]:
    """:func:`sample`, decoded. Yields uint8 images of shape (batch, 3, H, W) on the CPU."""
    for latents in sample(denoiser, scheduler, *args, **kwargs):
        yield to_uint8(codec.decode(latents)).cpu()


def find_classes(wanted: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Class ids for ids or names; where there is only one class, it need not be named.

    Raises:
        InputError: No class named, an id out of range or an unknown name; says what there is.
    """
    ids, last = [], len(class_names) - 1
    if not wanted and last == 0:
        return [0]
    known = f"this snapshot knows {last + 1} classes, 0 ({class_names[0]}) to {last} ({class_names[last]})"
    if not wanted:
        raise InputError(f"name at least one class, e.g. --class {last // 2}: {known}")
    for name in wanted:
        if name in class_names and not (name.isdigit() and int(name) < len(class_names)):
            ids.append(class_names.index(name))
        elif name.lstrip("-").isdigit():
            if not 0 <= int(name) < len(class_names):
                raise InputError(f"class {name} is out of range: {known}")
            ids.append(int(name))
        else:
            near = difflib.get_close_matches(name, class_names, n=3)
            guess = f"did you mean {', '.join(near)}? " if near else ""
            raise InputError(f"no class is called {name!r}: {guess}{known}")
    return ids


def draw_grid(images: torch.Tensor, captions: Sequence[str], columns: int, *, scale: int = 1) -> Image.Image:
    """One row of images per caption, the caption above its row.

    Shape: images (len(captions) * columns, 3, H, W) uint8.
    """
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    gap, bar = 4, 22
    canvas = Image.new("RGB", (columns * (width + gap) + gap, len(captions) * (height + bar) + gap), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for row, caption in enumerate(captions):
        top = row * (height + bar)
        draw.text((gap, top + 3), caption, fill="black", font=font)
        for column in range(columns):
            pixels = images[row * columns + column].permute(1, 2, 0).contiguous().numpy()
            picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(picture, (gap + column * (width + gap), top + bar))
    return canvas


def free_path(wanted: str | None, default: str) -> Path:
    """The path asked for, or the default one, numbered if it is taken.

    Raises:
        InputError: The path asked for exists already.
    """
    if wanted is not None:
        if Path(wanted).exists():
            raise InputError(f"{wanted} exists already; choose another --output")
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG", pnginfo=info)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def preview_grid(
    path: Path, denoiser: Denoiser, *, scheduler_config: dict[str, Any], codec: Codec, class_names: Sequence[str],
    guidance_scale: float,
) -> None:
    """Write the sample grid of a training run: fixed classes and seeds, so that grids of different steps compare."""
    count, columns = min(8, len(class_names)), 2  # few: a large model on a CPU must get through them
    classes = [index * len(class_names) // count for index in range(count)]
    labels = [label for label in classes for _ in range(columns)]
    batches = sample_images(
        denoiser, make_scheduler(None, scheduler_config), codec, labels, range(len(labels)),
        num_inference_steps=20, guidance_scale=guidance_scale,
    )
    draw_grid(torch.cat(list(batches)), [f"{label}: {class_names[label]}" for label in classes], columns).save(path)
