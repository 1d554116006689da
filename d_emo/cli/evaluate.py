"""``d-emo evaluate``."""

from dataclasses import asdict, replace
from pathlib import Path

from d_emo.config import EvaluateClassifierSettings
from d_emo.device import best_device
from d_emo.errors import InputError
from d_emo.files import write_json
from d_emo.io.classifier import open_classifier, open_images
from d_emo.io.snapshot import kind_of
from d_emo.io.video import KIND, open_video_classifier, open_videos
from d_emo.training.accuracy import measure_accuracy


def run(settings: EvaluateClassifierSettings) -> None:
    """Measure the accuracy, print it and write it where asked.

    Raises:
        InputError: Several clips or crops of images.
    """
    of_videos = kind_of(settings.model) == KIND
    if not of_videos and (settings.clips, settings.crops) != (1, 1):
        raise InputError(f"`clips` and `crops` are for classifiers of videos, and {settings.model} is none")
    classifier = (open_video_classifier if of_videos else open_classifier)(settings.model, settings.weights)
    if settings.data_dir is settings.dataset is None:
        settings = replace(settings, data_dir=classifier.validate_dir)
    images = (open_videos if of_videos else open_images)(settings, classifier)
    device = best_device()
    accuracy = measure_accuracy(
        classifier.model.to(device), images, batch_size=settings.batch_size, limit=settings.num_images,
        num_workers=settings.num_workers,
    )
    for line in filter(None, [images.left_out, *images.remarks()]):
        print(line)
    print(f"{classifier.name} on {settings.data_dir or images.name}, {images.image_size} px: "
          f"{accuracy.in_words('videos' if of_videos else 'images')}")  # fmt: skip
    if settings.output is not None:
        result = {"model": settings.model, "weights": settings.weights, **asdict(accuracy)}
        write_json(Path(settings.output), result)

