"""What a caller of ``d-emo sample`` or a visitor of the app asked for: from settings to labels, seeds and files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from d_emo.config import SampleSettings
from d_emo.data import to_uint8
from d_emo.io.snapshot import DenoiserSnapshot
from d_emo.sampling.classes import caption, find_classes, mix_classes, some_classes
from d_emo.sampling.denoising import Step, decode
from d_emo.sampling.files import save_gif, save_png, save_pngs
from d_emo.sampling.grids import draw_grid
from d_emo.sampling.guidance import Guidance
from d_emo.sampling.sampler import Sampler


class SampleRequest:
    """Settings settled for a snapshot.

    With ``interpolate``, the snapshot's model gets labels between the two classes; open a `Sampler` after this.

    Attributes:
        settings: Completed with what depends on the snapshot.
        classes: Ids of the classes.
        captions: Of the rows of a grid.
        columns: What is written above its columns: of an interpolation, the fraction of the second class.
        labels, seeds: Of each image.

    Raises:
        InputError: The settings do not fit the snapshot.
    """

    def __init__(self, settings: SampleSettings, snapshot: DenoiserSnapshot):
        settings = settings.resolve(objective=snapshot.objective, label_dropout=snapshot.label_dropout)
        self.settings, self.snapshot = settings, snapshot
        names, wanted = snapshot.class_names, settings.interpolate or settings.classes
        self.classes = find_classes(wanted, names) if wanted else some_classes(names)
        self.captions = [caption(label, names) for label in self.classes] if len(names) > 1 else list(names)
        self.columns: list[str] = []
        if settings.interpolate:
            self.captions, self.seeds = [" to ".join(self.captions)], [settings.seed] * settings.num_images
            self.columns = [f"{number / (settings.num_images - 1):.2f}" for number in range(settings.num_images)]
            self.labels = mix_classes(snapshot.model, *self.classes, settings.num_images)
        else:
            self.labels = [label for label in self.classes for _ in range(settings.num_images)]
            self.seeds = [settings.seed + index for index in range(len(self.labels))]

    @property
    def how(self) -> dict[str, Any]:
        """The arguments of `Sampler` and of its ``replace``; of several guidance scales the first."""
        settings = self.settings
        return {"scheduler": settings.scheduler, "steps": settings.steps, "guidance": Guidance.of(settings)}

    @property
    def default_path(self) -> str:
        """Where the pictures go when the settings do not say."""
        settings, alone = self.settings, len(self.snapshot.class_names) == 1
        names = "" if alone else "-" + "-".join(map(str, self.classes[:10]))
        kind = "interpolate" if settings.interpolate else "trajectory" if settings.trajectory else "class"
        kind = "image" if alone and kind == "class" else kind
        kind = "guidance" if len(settings.guidance_scale) > 1 else kind
        suffix = ".gif" if settings.trajectory == "gif" else ".png" if settings.format == "grid" else ""
        return f"samples/{kind}{names}-seed{settings.seed}{suffix}"

    @property
    def made_by(self) -> dict[str, Any]:
        """The settings that the files carry."""
        scales, meta = self.settings.guidance_scale, self.snapshot.meta
        return {
            **self.settings.to_record(), "guidance_scale": scales if len(scales) > 1 else scales[0],
            "classes": self.classes, "checkpoint": str(self.snapshot.path), "step": meta["step"],
            "weights": meta["weights"],
        }

    def draw(self, sampler: Sampler) -> Iterator[Step]:
        """Every step of every image, one guidance scale after the other."""
        for scale in self.settings.guidance_scale:
            scaled = sampler.replace(guidance=dataclasses.replace(sampler.guidance, scale=scale))
            yield from scaled.images(self.labels, self.seeds, batch_size=self.settings.batch_size, every_step=True)

    def save(self, output: Path, images: torch.Tensor, frames: torch.Tensor | None = None) -> None:
        """Write a grid, single PNGs, or the course of the denoising.

        Args:
            output: File or folder.
            images: As drawn. Shape: (guidance scales * N, 3, H, W) uint8.
            frames: Pictures of the steps, for a trajectory. Shape: (steps, N, 3, H, W) uint8.

        Raises:
            InputError: They cannot be written.
        """
        settings, captions, columns = self.settings, self.captions, self.settings.num_images
        if frames is None and settings.format == "png":
            save_pngs(images, output, self.labels, self.seeds, self.made_by)
        elif frames is None:
            images, captions = self._sweep(images)
            save_png(draw_grid(images, captions, columns, names=self.columns), output, self.made_by)
        elif settings.trajectory == "gif":
            grids = [draw_grid(frame, captions, columns, names=self.columns) for frame in frames]
            save_gif(grids, output, self.made_by)
        else:
            rows = [f"{captions[index // columns]}, seed {seed}" for index, seed in enumerate(self.seeds)]
            strip = frames.transpose(0, 1).flatten(0, 1)
            save_png(draw_grid(strip, rows, len(frames)), output, self.made_by)

    def _sweep(self, images: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """Images of several guidance scales, class by class, and the captions of their rows."""
        scales, captions = self.settings.guidance_scale, self.captions
        if len(scales) == 1:
            return images, captions
        by_class = images.unflatten(0, (len(scales), len(captions), -1)).transpose(0, 1).flatten(0, 2)
        return by_class, [f"{caption}, guidance {scale:g}" for caption in captions for scale in scales]


class Trajectory:
    """Keeps the latents of ``keep`` evenly spread steps of a denoising of ``steps``; the last is always among them."""

    def __init__(self, steps: int, keep: int = 12):
        keep = min(keep, steps)
        self.wanted = {round((number + 1) * steps / keep) - 1 for number in range(keep)}
        self.latents: dict[int, list[torch.Tensor]] = {}

    def take(self, step: Step) -> None:
        """Keep the latents of a step that is wanted."""
        if step.index in self.wanted:
            self.latents.setdefault(step.index, []).append(step.latents.cpu())

    def images(self, sampler: Sampler) -> torch.Tensor:
        """What the kept latents decode to. Shape: -> (kept steps, images, 3, H, W) uint8."""
        kept = [torch.cat(self.latents[index]) for index in sorted(self.latents)]
        return torch.stack([to_uint8(decode(sampler.codec, latents.to(sampler.device))).cpu() for latents in kept])
