"""``d-emo explain``."""

from pathlib import Path

import torch

from d_emo.cli.outputs import claimed_default
from d_emo.config import ExplainSettings
from d_emo.data import Reading, load_image
from d_emo.errors import InputError
from d_emo.explain import explain
from d_emo.io.classifier import open_classifier


def run(settings: ExplainSettings) -> None:
    """Do it.

    Raises:
        InputError: The classifier has no such label.
    """
    classifier = open_classifier(settings.model)
    network = classifier.model
    size = settings.image_size or classifier.image_size
    image = load_image(Path(settings.image), size, reading=Reading.of(settings))
    with torch.no_grad():
        shares = network(image[None])[0].softmax(dim=0)
    label = int(shares.argmax()) if settings.label is None else settings.label
    if not 0 <= label < len(shares):
        raise InputError(f"`label` must be from 0 to {len(shares) - 1}, not {label}")
    name = f"class {label}" if classifier.class_names is None else classifier.class_names[label]
    with claimed_default("explain", settings, f"samples/explain-{Path(settings.image).stem}") as folder:
        for path in explain(network, classifier.emo, image, label, name, folder, stage=settings.stage):
            print(f"picture  {path}")
    print(f"class    {name} ({shares[label]:.1%} likely by {classifier.name})")

