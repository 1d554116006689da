"""``d-emo evaluate``."""

from dataclasses import asdict, replace
from pathlib import Path

from d_emo.config import EvaluateClassifierSettings
from d_emo.device import best_device
from d_emo.files import write_json
from d_emo.io.classifier import open_classifier, open_images
from d_emo.training.accuracy import measure_accuracy


def run(settings: EvaluateClassifierSettings) -> None:
    """Measure the accuracy, print it and write it where asked."""
    classifier = open_classifier(settings.model, settings.weights)
    if settings.data_dir is settings.dataset is None:
        settings = replace(settings, data_dir=classifier.validate_dir)
    images = open_images(settings, classifier)
    device = best_device()
    accuracy = measure_accuracy(
        classifier.model.to(device), images, batch_size=settings.batch_size, limit=settings.num_images,
        num_workers=settings.num_workers,
    )
    for line in filter(None, [images.left_out, *images.remarks()]):
        print(line)
    print(f"{classifier.name} on {settings.data_dir or images.name}, {images.image_size} px: {accuracy}")
    if settings.output is not None:
        result = {"model": settings.model, "weights": settings.weights, **asdict(accuracy)}
        write_json(Path(settings.output), result)

