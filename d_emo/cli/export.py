"""``d-emo export``."""

import sys
from pathlib import Path

from d_emo.config import ExportSettings
from d_emo.export import export, open_portable


def run(settings: ExportSettings) -> None:
    """Do it."""
    title, network = open_portable(settings.model, settings.image_size)
    path = Path(settings.output)
    difference = export(network, path)
    inputs = zip(network.input_names, network.example(1), strict=True)
    shapes = ", ".join(f"{name} {tuple(x.shape)[1:]}" for name, x in inputs)
    print(f"wrote    {path}\nnetwork  {title}, batch norms folded")
    print(f"inputs   {shapes}, after the batch\nwhere    {network.meaning}")
    if difference is None:
        print("checked  converted and read back; this operating system cannot run it")
        return
    print(f"checked  differs from PyTorch by at most {difference:.1e} of the largest output")
    if difference > settings.tolerance:
        print(f"error: that is more than --tolerance {settings.tolerance:g}", file=sys.stderr)
        sys.exit(1)

