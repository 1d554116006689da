"""``d-emo encode``."""

from accelerate.utils import reduce

from d_emo.config import EncodeSettings
from d_emo.data import Reading, open_dataset
from d_emo.latents import default_codec, encode, load_codec
from d_emo.text import command
from d_emo.threads import loader_workers, use_threads
from d_emo.training.parallel import open_processes


def run(settings: EncodeSettings) -> None:
    """Do it."""
    process = open_processes()
    use_threads(process.device, process.num_processes)
    workers = loader_workers(settings.num_workers, process.device, process.num_processes)
    with process.local_main_process_first():
        images = open_dataset(
            dataset=settings.dataset, data_dir=settings.data_dir, image_size=settings.image_size,
            num_images=settings.num_images, skip_corrupt=settings.skip_corrupt, sequential=True,
            reading=Reading.of(settings), flip=settings.flip,
        )
        codec = load_codec(settings.vae or default_codec(settings.data_dir)).to(process.device)
    if images.sequential:
        workers = 0
    complete = encode(
        images, codec, settings.output, device=process.device, dtype=settings.dtype, batch_size=settings.batch_size,
        shard_size=settings.shard_size, num_workers=workers, rank=process.process_index,
        world_size=process.num_processes,
    )
    remarks = images.remarks(lambda seen: reduce(seen.int().to(process.device), "sum").count_nonzero())
    process.destroy_process_group()
    for line in filter(None, [images.left_out, *remarks]) if process.is_main_process else ():
        print(line)
    if process.num_processes > 1 and process.is_main_process:
        print(f"{process.num_processes} processes shared the work")
    if complete:
        print(f"latents   {settings.output}  ({len(images):,} images of {len(images.class_names)} classes)\n"
              f"train     {command('train', 'train_dit.py')} --latents {settings.output}")

