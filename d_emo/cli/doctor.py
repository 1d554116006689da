"""``d-emo doctor``, and what ``--dry-run`` of training prints."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from PIL import Image

from d_emo.cli.outputs import claimed_default
from d_emo.config import DoctorSettings
from d_emo.data import Reading, open_dataset, open_held_out
from d_emo.device import best_device
from d_emo.doctor import SHEET_SIDE, Findings, contact_sheet, describe, describe_latents, examine, sheet_of
from d_emo.errors import InputError, said
from d_emo.files import free_path, replacing
from d_emo.latents import latent_side, load_codec
from d_emo.training.rehearsal import Rehearsable, rehearse

MOST_CLASSES = 8
"""Of the classes, the largest first, how many are listed with their images."""


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
    _save(contact_sheet(found, chosen, pixels), output)
    _print([*lines, ("sheet", f"{output}  ({len(chosen)} images as training sees them)")])


def dry_run(task: Rehearsable) -> None:
    """What ``--dry-run`` of training does: the doctor's lines, a few images through the network, a picture of them."""
    images, held_out, settings = task.dataset, task.held_out, task.settings
    lines = [("run", line) for line in task.introduction() if line != images.left_out]
    if getattr(settings, "latents", None) is None:
        found, others = (each and examine(each, DoctorSettings.sample) for each in (images, held_out))
        lines += describe(found, batch_size=settings.batch_size, max_steps=settings.max_steps, held_out=others)
    counts = Counter(map(images.label, range(len(images)))).most_common(MOST_CLASSES)
    named = [f"{images.class_names[label]} {count:,}" for label, count in counts]
    _print([*lines, ("by class", ", ".join(named + ["..."] * (len(images.class_names) > MOST_CLASSES)))])
    tried = rehearse(task)
    whole = timedelta(seconds=round(tried.seconds * settings.max_steps))
    lines = [("time", f"{tried.seconds:.3g} s a step of {settings.batch_size:,} images by one process here; all "
                      f"{settings.max_steps:,} steps: {whole} (h:mm:ss)"), ("memory", f"{tried.gib:.2g} GiB")]
    output, shown = free_path(f"samples/dry-run-{Path(settings.output_dir).name}.png"), tried.images[: SHEET_SIDE**2]
    found = Findings(images, labels=dict(enumerate(tried.labels.tolist())))
    _save(contact_sheet(found, range(len(shown)), shown), output)
    _print([*lines, ("batch", f"{output}  ({len(shown)} images as the network sees them)")])


def _save(picture: Image.Image, output: Path) -> None:
    with replacing(output) as temporary:
        picture.save(temporary, format="PNG")


def _print(lines: Sequence[tuple[str, str]]) -> None:
    width = max(len("duplicates"), *(len(topic) for topic, _ in lines))
    print(said("\n".join(f"{topic:<{width}}  {text}" for topic, text in lines)), flush=True)
