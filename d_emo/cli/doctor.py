"""``d-emo doctor``, and what ``--dry-run`` of training prints of images with labels."""

from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from d_emo.cli.dry_run import dry_run, print_lines, save
from d_emo.cli.outputs import claimed_default
from d_emo.config import DoctorSettings
from d_emo.data import ClassImages, Reading, open_dataset, open_held_out
from d_emo.data.describing import largest
from d_emo.device import best_device
from d_emo.doctor import SHEET_SIDE, Findings, contact_sheet, describe, describe_latents, examine, sheet_of
from d_emo.errors import InputError
from d_emo.latents import latent_side, load_codec
from d_emo.training.rehearsal import Rehearsal
from d_emo.training.task import Task


def run(settings: DoctorSettings) -> None:
    """Do it."""
    with claimed_default("doctor", settings, f"samples/{Path(settings.run_folder('doctor')).name}.png") as output:
        look(settings, output)


def look(settings: DoctorSettings, output: Path) -> None:
    """Read the data set, write the contact sheet and print the table.

    Raises:
        InputError: Not one image can be read.
    """
    codec = None if settings.vae is None else load_codec(settings.vae).to(best_device())
    if codec is not None:
        latent_side(codec, settings.image_size)
    images = open_dataset(
        dataset=settings.dataset, data_dir=settings.data_dir, image_size=settings.image_size,
        num_images=settings.num_images, one_class=settings.unconditional, sequential=True,
        reading=Reading.of(settings), flip=settings.flip,
    )
    others = held_out = None
    if settings.validate_dir is not None:
        others = open_held_out(settings, images.class_names, one_class=settings.unconditional)
    found = examine(images, settings.sample or None)
    if not found.digests:
        raise InputError(f"none of the {len(found.unreadable):,} images that were tried could be read; the first: "
                         f"{next(iter(found.unreadable.values()))}")
    if others is not None:
        held_out = examine(others, settings.sample or None)
    lines = describe(found, batch_size=settings.batch_size, max_steps=settings.max_steps, held_out=held_out)
    chosen, pixels = sheet_of(found)
    if codec is not None:
        lines += describe_latents(codec, pixels.to(best_device()))
    save(contact_sheet(found, chosen, pixels), output)
    print_lines([*lines, ("sheet", f"{output}  ({len(chosen)} images as training sees them)")])


class Rehearsable(Task, Protocol):
    """A task on images with labels that can show what its network sees."""

    dataset: ClassImages
    held_out: ClassImages | None  # to validate on

    def seen(self, batch: Any, draws: Any) -> torch.Tensor:
        """The images of a micro-batch as the network sees them, latents decoded. Shape: -> (B, 3, H, W)."""


def dry_run_of_images(task: Rehearsable) -> None:
    """``--dry-run`` of training on images with labels: the doctor's lines, and what `dry_run` does."""
    images, held_out, settings = task.dataset, task.held_out, task.settings
    lines = [("run", line) for line in task.introduction() if line != images.left_out]
    if getattr(settings, "latents", None) is None:
        found, others = (each and examine(each, DoctorSettings.sample) for each in (images, held_out))
        lines += describe(found, batch_size=settings.batch_size, max_steps=settings.max_steps, held_out=others)
    counts = Counter(map(images.label, range(len(images))))

    def picture(tried: Rehearsal) -> tuple[Image.Image, int]:
        with torch.no_grad():
            shown = task.seen(tried.batch, tried.draws).float().cpu()[: SHEET_SIDE**2]
        labels = dict(enumerate(tried.batch[1].tolist()))
        return contact_sheet(Findings(images, labels=labels), range(len(shown)), shown), len(shown)

    dry_run(task, [*lines, ("by class", largest(counts, images.class_names))], picture)
