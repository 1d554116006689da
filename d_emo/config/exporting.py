"""Settings of what leaves for other programs."""

from dataclasses import dataclass

from d_emo.config.base import Settings, overwrite_setting, setting
from d_emo.config.ranges import ClassifierSide, Positive


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Settings of ``scripts/export.py``."""

    model: str = setting(
        help="a snapshot or run folder of a denoiser, classifier or segmenter, a released .pth file, a folder made by "
        "convert_weights.py, or a name of list_models() with random weights", flag="MODEL", group="Model",
        source="or a name"
    )
    image_size: ClassifierSide | None = setting(
        None, "side of a classifier's or segmenter's images in pixels. Default: its own"
    )
    output: str = setting(
        help="file to write, ending in .onnx, .pt2 (torch.export) or .mlpackage", flag="OUT", group="Output",
        output="file",
    )
    overwrite: bool = overwrite_setting()
    tolerance: Positive = setting(1e-4, "largest difference from PyTorch's outputs, relative to the largest of them")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """Settings of ``scripts/convert_weights.py``."""

    source: str = setting(
        help="a released .pth file, or a snapshot folder of a classifier", flag="IN", group="Weights", source=True
    )
    model: str | None = setting(None, "the variant that the file should hold. Default: whatever it holds")
    output: str = setting(
        help="folder to write model.safetensors and config.json to", flag="OUT", group="Output", output="folder"
    )
    overwrite: bool = overwrite_setting()
