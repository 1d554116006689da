"""Segmenters of images in [-1, 1], ready to run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from d_emo.config import Blend, check_values
from d_emo.errors import InputError
from d_emo.io.classifier import Normalized
from d_emo.io.snapshot import load_classifier
from d_emo.models import create_model
from d_emo.models.registry import model_kind
from d_emo.segmentation.sliding import Windows


@dataclass(frozen=True)
class OpenSegmenter:
    """A segmenter of images in [-1, 1], in eval mode, and what is known of the images it was trained on.

    ``windows`` are those that it was measured in, None where it was measured on whole images.
    """

    name: str
    model: Normalized
    class_names: list[str]
    image_size: int
    windows: Windows | None = None


def open_segmenter(source: str) -> OpenSegmenter:
    """A snapshot or run folder, or a name of `list_models` (with random weights).

    Raises:
        InputError: It is neither, or damaged.
    """
    if not Path(source).exists() and "/" not in source:
        if (kind := model_kind(source)) != "segmenter":
            raise InputError(f"{source} is a {kind}; name a segmenter such as segformer-emov2_5m, or a run folder")
        torch.manual_seed(0)
        model = create_model(source).eval()
        names = [f"class {number}" for number in range(model.num_classes)]
        plain = Normalized(model, (0.5,) * 3, (0.5,) * 3)
        return OpenSegmenter(f"{source} with random weights", plain, names, model.input_size[0])
    snapshot = load_classifier(source, "segmenter")
    normalisation = snapshot.meta.get("normalisation")
    if normalisation is None:
        raise InputError(f"the snapshot {snapshot.path} does not say how its images are normalised; it is damaged")
    model, windows = Normalized(snapshot.model, normalisation["mean"], normalisation["std"]).eval(), None
    if given := snapshot.meta.get("windows"):
        try:
            windows = Windows(**check_values(given, {"size": int, "stride": int, "blend": Blend}))
        except (InputError, TypeError) as error:
            raise InputError(f"the snapshot {snapshot.path} is damaged: its windows cannot be used ({error})") from None
    return OpenSegmenter(str(snapshot.path), model, snapshot.class_names, snapshot.image_size, windows)
