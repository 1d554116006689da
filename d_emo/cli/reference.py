"""``d-emo reference``."""

from pathlib import Path

from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from d_emo.config import PUBLISHED_COUNT, ReferenceSettings, folder_of, is_folder
from d_emo.data import Reading, list_folders, open_dataset, to_uint8
from d_emo.data.describing import look_at, some
from d_emo.device import best_device
from d_emo.evaluation import check_output, create_extractor, write_reference
from d_emo.evaluation.npz import choose_evenly


def run(settings: ReferenceSettings) -> None:
    """Write a reference of real images, and say what it holds."""
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    built_in = None if settings.data_dir else settings.num_images or PUBLISHED_COUNT
    folder = settings.data_dir and is_folder(settings.data_dir) and folder_of(settings.data_dir)
    dataset = open_dataset(
        dataset=settings.dataset, data_dir=settings.data_dir, image_size=settings.image_size, split=settings.split,
        num_images=built_in, skip_corrupt=None if settings.skip_corrupt else False, reading=Reading.of(settings),
        one_class=bool(folder) and not list_folders(folder),  # it has no classes, which nobody asks for here
    )  # fmt: skip
    readable, failed = range(len(dataset)), []
    if settings.skip_corrupt:  # training takes the next image instead, which here would count twice
        readable, failed = look_at(len(dataset), None, lambda index: dataset[index] and index)
    name = settings.data_dir or f"the data set {settings.dataset}"
    chosen = [readable[index] for index in choose_evenly(len(readable), settings.num_images, name)]
    device = best_device()
    extractor = create_extractor(settings.features, inception_weights=settings.inception_weights, device=device)
    loader = DataLoader(Subset(dataset, chosen), settings.batch_size, num_workers=settings.num_workers)
    shown = tqdm(loader, desc="reference", unit="batch", disable=None)
    kept = min(settings.kept_images, len(chosen))
    write_reference(
        output, (to_uint8(images).to(device) for images, _ in shown), extractor, num_images=len(chosen),
        image_size=(settings.image_size, settings.image_size), kept_images=kept,
    )  # fmt: skip
    print(f"reference  {output} ({output.stat().st_size / 1e6:.1f} MB)")
    print(f"images     {len(chosen):,} of {dataset.name} at {settings.image_size} px, {kept:,} of them stored")
    print(f"features   {extractor.name}", *filter(None, [dataset.left_out, *dataset.remarks()]), sep="\n")
    if failed:
        print(f"left out   {len(failed):,} image{'s' * (len(failed) > 1)}: {some(failed, '; ')}")

