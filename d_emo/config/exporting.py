"""Settings of what leaves for other programs."""

from dataclasses import dataclass

from d_emo.config.base import Settings, overwrite_setting, setting
from d_emo.config.ranges import ClassifierSide, Opset, Positive
from d_emo.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Settings):
    """Settings of ``scripts/export.py``."""

    model: str = setting(
        help="a snapshot or run folder of a denoiser, classifier, detector or segmenter, a released .pth file, a folder"
        " made by d-emo convert, or a name of list_models() with random weights", flag="MODEL", group="Model",
        source="or a name"
    )
    image_size: list[ClassifierSide] = setting(
        [], "side of images in pixels, or height and width; not of a denoiser. Default: the network's own"
    )
    dynamic_size: bool = setting(
        False, "let the exported network take images of any height and width, as it takes any batch; .onnx and .pt2"
    )
    detections: bool = setting(
        False, "of a detector, write what it finds in one image (boxes, scores, labels, masks), with thresholds and "
        "non-maximum suppression, instead of a box and scores for every anchor; .onnx"
    )
    output: str = setting(
        help="file to write, ending in .onnx, .pt2 (torch.export) or .mlpackage", flag="OUT", group="Output",
        output="file",
    )
    overwrite: bool = overwrite_setting()
    opset: Opset | None = setting(None, "of an .onnx file, the version of the operators. Default: 18")
    int8: bool = setting(False, "of an .onnx file, linear layers in int8 (onnxruntime's dynamic quantisation)")
    tolerance: Positive | None = setting(
        None, "largest difference from PyTorch's outputs, relative to the largest of them. Default: 1e-4, or 0.1 with "
        "--int8"
    )

    def check(self) -> None:
        if len(self.image_size) > 2:
            raise InputError(f"`image_size` must be one side, or height and width, not {self.image_size}")

    @property
    def allowed(self) -> float:
        """The tolerance that holds."""
        return self.tolerance or (0.1 if self.int8 else 1e-4)


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
