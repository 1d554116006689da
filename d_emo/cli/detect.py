"""``d-emo detect``."""

from typing import Any

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from d_emo.cli.inputs import find_images, read_images
from d_emo.cli.outputs import claimed_default
from d_emo.config import DetectSettings
from d_emo.data import Reading
from d_emo.detection.drawing import detect, draw_objects
from d_emo.device import best_device
from d_emo.files import filling, write_json
from d_emo.io.snapshot import load_classifier


def run(settings: DetectSettings) -> None:
    """Do it.

    Raises:
        InputError: A folder without images, an image that cannot be read, or a model that is no detector.
    """
    files, reading = find_images(settings.images), Reading.of(settings)
    snapshot = load_classifier(settings.checkpoint, "detector")
    model, names = snapshot.model.to(best_device()), snapshot.class_names
    with claimed_default("detect", settings, f"samples/detect-{files[0].stem}") as folder, filling(folder) as new:
        entries = []
        for number, file, image in read_images(files, reading, skip_corrupt=settings.skip_corrupt):
            found = detect(model, image, settings.score)
            drawn = f"{number:04d}-{file.stem}.png" if len(files) > 1 else f"{file.stem}.png"
            F.to_pil_image(draw_objects(image, found, names)).save(new / drawn)
            entries.append({"image": str(file), "width": image.shape[2], "height": image.shape[1], "picture": drawn,
                            "objects": _objects(found, names)})  # fmt: skip
        write_json(new / "detections.json", {"model": str(snapshot.path), "score": settings.score, "images": entries})
    for entry in entries:
        words = ", ".join(f"{each['class']} {each['score']:.0%}" for each in entry["objects"]) or "nothing"
        print(f"picture  {folder / entry['picture']}: {words}")
    print(f"objects  {folder / 'detections.json'}")


def _objects(found: dict[str, Tensor], names: list[str]) -> list[dict[str, Any]]:
    """What was found as JSON holds it: boxes in pixels as left, top, right, bottom; masks as COCO's run lengths."""
    rows = [
        {"class": names[label], "label": label, "score": round(score, 4), "box": [round(n, 2) for n in box]}
        for label, score, box in zip(*(found[name].tolist() for name in ("labels", "scores", "boxes")), strict=True)
    ]
    for row, mask in zip(rows, found.get("masks", ()), strict=False):
        row["mask"] = {"size": list(mask.shape), "counts": run_lengths(mask)}
    return rows


def run_lengths(mask: Tensor) -> list[int]:
    """Lengths of runs of a mask, column by column, the first one of zeros. Shape: mask (H, W) bool."""
    flat = np.concatenate([[False], mask.numpy().T.ravel(), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    lengths = np.diff(np.concatenate([[0], edges, [mask.numel()]]))
    return [int(length) for length in (lengths if lengths[-1] else lengths[:-1])]
