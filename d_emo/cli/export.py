"""``d-emo export``."""

import sys
from pathlib import Path

import torch

from d_emo.config import ExportSettings
from d_emo.export import BATCHES, export, open_portable


def run(settings: ExportSettings) -> None:
    """Do it."""
    size = (settings.image_size * 2)[:2] or None
    title, network = open_portable(
        settings.model, size, dynamic_size=settings.dynamic_size, detections=settings.detections
    )
    path = Path(settings.output)
    difference = export(network, path, opset=settings.opset, int8=settings.int8)
    inputs = zip(network.input_names, network.example(1), strict=True)
    shapes = ", ".join(f"{name} {tuple(x.shape)[0 if network.found else 1 :]}" for name, x in inputs)
    print(f"wrote    {path}\nnetwork  {title}, batch norms folded")
    after = "" if network.found else ", after the batch"
    free = ", with free height and width" if network.dynamic_size else ""
    print(f"inputs   {shapes}{after}{free}\nwhere    {network.meaning}")
    if difference is None:
        print("checked  converted and read back; this operating system cannot run it")
        return
    if network.found:
        with torch.no_grad():
            objects = sum(len(network.module(*network.example(batch))[0]) for batch in BATCHES)
        print(f"objects  {objects} in the {len(BATCHES)} images that were tried at this size")
    print(f"checked  differs from PyTorch by at most {difference:.1e} of the largest output")
    if difference > settings.allowed:
        print(f"error: that is more than --tolerance {settings.allowed:g}", file=sys.stderr)
        sys.exit(1)

