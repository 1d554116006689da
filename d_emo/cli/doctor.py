"""``d-emo doctor``."""

from pathlib import Path

from d_emo.cli.outputs import claimed_default
from d_emo.config import DoctorSettings
from d_emo.data import Reading, open_dataset, open_held_out
from d_emo.device import best_device
from d_emo.doctor import contact_sheet, describe, describe_latents, examine, sheet_of
from d_emo.errors import InputError, said
from d_emo.files import replacing
from d_emo.latents import load_codec


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
    with replacing(output) as temporary:
        contact_sheet(found, chosen, pixels).save(temporary, format="PNG")
    lines.append(("sheet", f"{output}  ({len(chosen)} images as training sees them)"))
    width = max(len(topic) for topic, _ in lines)
    print(said("\n".join(f"{topic:<{width}}  {text}" for topic, text in lines)))
