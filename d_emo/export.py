"""Networks for use without Python: ONNX, torch.export and Core ML, each compared with PyTorch after it was written."""

import contextlib
import copy
import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from d_emo.detection.features import Detector
from d_emo.errors import InputError, write_error
from d_emo.files import filling
from d_emo.io.classifier import open_classifier
from d_emo.io.segmenter import open_segmenter
from d_emo.io.snapshot import kind_of, load_classifier, load_denoiser
from d_emo.models import create_model
from d_emo.models.contract import DenoiserFrame
from d_emo.models.layers import fold_batch_norms, pair
from d_emo.tables import family_of, system_of

OPSET = 18
BATCHES = (1, 3)
"""Batch sizes that an exported network is compared at; it is traced with another one."""

SIZES = ((33, 40), (64, 96), (97, 75), (160, 224), (256, 256))
"""Heights and widths that a network with free ones is compared at; a side of 32 px is one token, which is fixed."""

ONE_FILE = 2_000_000_000
"""Bytes of weights beyond which an ONNX file keeps them in a second file, OUT.data: the format ends at 2 GiB."""


class DenoiserOutput(nn.Module):
    """A denoiser as a plain function of three tensors.

    Shape: latents (B, C, *sizes), timesteps (B,), class_labels (B,) -> (B, C_out, *sizes).
    """

    def __init__(self, denoiser: DenoiserFrame) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        return self.denoiser(latents, timesteps, class_labels, return_dict=False)[0]


class BoxesAndScores(nn.Module):
    """A detector without non-maximum suppression, for square images of one size.

    Shape: images (B, 3, side, side) in [0, 1] -> (B, anchors, 4 + classes), not clipped to the image.
    """

    def __init__(self, detector: Detector, side: int) -> None:
        super().__init__()
        self.detector = detector
        images = torch.zeros(1, 3, side, side)
        with torch.no_grad():
            maps = list(detector.backbone(images).values())
            (anchors,) = detector.anchor_generator(ImageList(images, [(side, side)]), maps)
        self.register_buffer("anchors", anchors)
        mean, std = (torch.tensor(each)[:, None, None] for each in (detector.transform.image_mean,
                                                                    detector.transform.image_std))  # fmt: skip
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.detector.dense_outputs((images - self.mean) / self.std)
        logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]
        anchors = self.anchors.expand(images.shape[0], -1, -1).flatten(0, 1)
        boxes = self.detector.box_coder.decode_single(deltas.flatten(0, 1), anchors).unflatten(0, deltas.shape[:2])
        background = self.detector.first_label  # softmax with one, sigmoid without
        scores = logits.softmax(dim=2)[:, :, 1:] if background else logits.sigmoid()
        return torch.cat([boxes, scores], dim=2)  # (B, anchors, 4 + classes)


class SegmenterOutput(nn.Module):
    """A segmenter as a plain function of images. Shape: (B, 3, H, W) -> (B, num_classes, H, W)."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter(images)["out"]


@dataclass(frozen=True)
class Portable:
    """A network ready for export: a plain module in eval mode, batch norms folded, and inputs to try it with."""

    module: nn.Module
    input_names: tuple[str, ...]
    example: Callable[..., tuple[Tensor, ...]]  # of a batch size and, where the sides are free, height and width
    meaning: str  # of the inputs, for whoever has to make them
    dynamic_size: bool = False  # whether height and width are free, as the batch is


def portable_classifier(
    network: nn.Module, image_size: int | Sequence[int], channels: int = 3, *, dynamic_size: bool = False
) -> Portable:
    """A classifier of images in [-1, 1], on a copy.

    Args:
        network: an `EMO`, or a module around one.
        image_size: side of square images in pixels, or height and width.
        channels: of the images.
        dynamic_size: whether the exported network shall take any other size too.
    """

    def example(batch: int, size: int | Sequence[int] = image_size) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.rand(batch, channels, *pair(size, "image_size"), generator=generator) * 2 - 1,)

    folded = fold_batch_norms(copy.deepcopy(network).cpu().float().eval())
    return Portable(folded, ("images",), example, "images are in [-1, 1]", dynamic_size)


def portable_denoiser(denoiser: DenoiserFrame) -> Portable:
    """A denoiser at its own sample size, on a copy; timesteps are float32."""

    def example(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        latents = torch.randn(batch, *denoiser.latent_shape, generator=generator)
        timesteps = torch.randint(1000, (batch,), generator=generator).float()
        return latents, timesteps, torch.randint(denoiser.null_class + 1, (batch,), generator=generator)

    module = DenoiserOutput(fold_batch_norms(copy.deepcopy(denoiser).cpu().float().eval()))
    meaning = f"timesteps are float32 in 0..1000, class_labels int64; {denoiser.null_class} means no class"
    return Portable(module.eval(), ("latents", "timesteps", "class_labels"), example, meaning)


def portable_detector(detector: Detector, image_size: Sequence[int] | int | None = None) -> Portable:
    """SSDLite or RetinaNet up to its boxes and scores, on a copy, for images of one size; what suppresses is left out.

    Args:
        detector: One with a single stage.
        image_size: Side of the square images in pixels. Default: its own (shorter) side.

    Raises:
        InputError: A detector whose second stage depends on what the first one found; sides that differ.
    """
    if hasattr(detector, "roi_heads"):
        raise InputError("Mask R-CNN looks at the regions that it found, which no plain graph does; export SSDLite or "
                         "RetinaNet")  # fmt: skip
    side, other = pair(image_size or min(detector.input_size), "image_size")
    if side != other:
        raise InputError(f"`image_size` of a detector must be one side, not {side} and {other}")

    def example(batch: int) -> tuple[Tensor, ...]:
        return (torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(batch)),)

    module = BoxesAndScores(fold_batch_norms(copy.deepcopy(detector).cpu().float().eval()), side)
    meaning = "images are in [0, 1]; of every anchor left, top, right, bottom in pixels, then a score for each class"
    return Portable(module.eval(), ("images",), example, meaning)


def export(network: Portable, path: Path, **options: Any) -> float | None:
    """Write a network in the format of the path's ending, run the file, and compare.

    Args:
        network: see `portable_classifier` and `portable_denoiser`.
        path: ends in .onnx, .pt2 or .mlpackage.
        options: of `write_onnx`.

    Returns:
        The largest difference from PyTorch's outputs over several batch sizes (and image sizes, where these are free),
        as a fraction of the largest output, infinite if one is not finite; None where the file cannot be run here (Core
        ML, outside of macOS).

    Raises:
        InputError: for another ending, a path that cannot be written, a package that is not installed, or an option
            that the format does not have.
    """
    writers = {".onnx": write_onnx, ".pt2": write_torch, ".mlpackage": write_coreml}
    if path.suffix not in writers:
        raise InputError(f"{path} ends in none of {', '.join(writers)}; the ending names the format")
    if path.suffix != ".onnx" and (given := [name for name, value in options.items() if value]):
        raise InputError(f"`{given[0]}` is for .onnx files, not for {path.suffix}")
    if path.suffix == ".mlpackage" and network.dynamic_size:
        raise InputError("`dynamic_size` is for .onnx and .pt2 files; a Core ML package is of one size")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; make it first")
    try:
        with filling(path.parent, path.name) as folder:  # its own name, which ONNX writes into a second file
            run = writers[path.suffix](network, folder / path.name, **(options if path.suffix == ".onnx" else {}))
    except ImportError as error:
        extra = "coreml" if path.suffix == ".mlpackage" else "export"
        raise InputError(f'{path.suffix} needs a package ({error}): pip install "d-emo[{extra}]"') from error
    if run is None:
        return None
    worst, sizes = 0.0, SIZES if network.dynamic_size else ()
    for case in [*((batch,) for batch in BATCHES), *((1 + number % 3, size) for number, size in enumerate(sizes))]:
        inputs = network.example(*case)
        with torch.no_grad():
            expected = network.module(*inputs)
        difference = ((run(*inputs) - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, difference) if math.isfinite(difference) else math.inf
    return worst


Runner = Callable[..., Tensor]


@torch.no_grad()
def traced(network: Portable) -> torch.export.ExportedProgram:
    """The network as a graph whose batch size is free and, with ``dynamic_size``, the images' height and width."""
    inputs, batch = network.example(2), torch.export.Dim("batch", min=1, max=4096)
    sides = {2 + i: torch.export.Dim(name, min=33, max=4096) for i, name in enumerate(("height", "width"))}
    free = {0: batch, **(sides if network.dynamic_size else {})}
    return torch.export.export(network.module, inputs, dynamic_shapes=tuple(free for _ in inputs))


def write_torch(network: Portable, path: Path) -> Runner:
    """A ``.pt2`` file, for ``torch.export.load``."""
    archive = io.BytesIO()  # where a disk is full, torch's own writer of files ends the process
    torch.export.save(traced(network), archive)
    path.write_bytes(archive.getvalue())
    return torch.export.load(path).module()


def write_onnx(network: Portable, path: Path, *, opset: int | None = None, int8: bool = False) -> Runner:
    """An ONNX file, checked by onnxruntime.

    Args:
        network, path: see `export`.
        opset: version of ONNX's operators. Default: `OPSET`.
        int8: linear layers in int8, their inputs scaled as they come (onnxruntime's dynamic quantisation).

    Raises:
        InputError: The versions that are here cannot write this ``opset``, or these layers in int8.
    """
    import onnxruntime
    import onnxscript  # noqa: F401  needed by torch.onnx, named here so that its absence is told

    size = sum(parameter.nbytes for parameter in network.module.parameters())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = traced(network)
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                program, (), str(path), dynamo=True, opset_version=opset or OPSET, output_names=["output"],
                input_names=list(network.input_names), external_data=size > ONE_FILE,
            )  # fmt: skip
    except Exception as error:  # the converter of versions, of onnx_ir, raises its own
        if opset in (None, OPSET) or isinstance(error, OSError):
            raise
        raise InputError(
            f"this PyTorch ({torch.__version__}) cannot write `opset` {opset} of this network "
            f"({type(error).__name__}); leave it out for {OPSET}"
        ) from error
    if int8:
        from onnxruntime.quantization import quantize_dynamic

        whole = path.rename(path.with_suffix(".float32.onnx"))
        try:
            quantize_dynamic(whole, path, op_types_to_quantize=["MatMul", "Gemm"])
        except Exception as error:  # onnx raises its own where it cannot tell the shapes
            if isinstance(error, OSError):
                raise
            raise InputError(
                f"onnxruntime {onnxruntime.__version__} cannot write this network with `int8` "
                f"({type(error).__name__}); newer versions of onnx and onnxruntime can"
            ) from error
        whole.unlink()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in zip(network.input_names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def write_coreml(network: Portable, path: Path) -> Runner | None:
    """A Core ML package for batch 1, which only macOS can run; InputError where Core ML cannot express the network."""
    import coremltools

    with torch.no_grad():
        graph = torch.export.export(network.module, network.example(1)).run_decompositions({})
    try:
        converted = coremltools.convert(
            graph, convert_to="mlprogram", minimum_deployment_target=coremltools.target.iOS17,
            compute_precision=coremltools.precision.FLOAT32,
        )
    except Exception as error:  # coremltools raises many types for what it has no operator for
        if write_error(error, path):  # it writes temporary files
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"Core ML cannot express this network ({type(error).__name__}: {reason})") from error
    converted.save(str(path))
    coremltools.models.MLModel(str(path), skip_model_load=True)
    return None


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Give a new network values all of which its output shows: it starts with closed gates and plain batch norms."""
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)


def open_portable(
    source: str, image_size: int | Sequence[int] | None = None, *, dynamic_size: bool = False
) -> tuple[str, Portable]:
    """What it is called, and the network: a snapshot or run folder, a released file, a timm folder or a model's name.

    Raises:
        InputError: if it is none of them, or image sizes are spoken of for a denoiser.
    """
    denoiser, kind = None, kind_of(source) or getattr(system_of(source), "task", None) or family_of(source)
    if dynamic_size and kind not in (None, "classifier"):
        raise InputError("`dynamic_size` is for classifiers; others have sizes of their own")
    if Path(source).is_dir() and kind_of(source) == "detector":
        detector = load_classifier(source, "detector")
        return str(detector.path), portable_detector(detector.model, image_size)
    if not Path(source).exists() and getattr(system_of(source), "task", "") == "detection":
        torch.manual_seed(0)
        detector = create_model(source).eval()
        stir(detector)
        return f"{source} with random weights", portable_detector(detector, image_size)
    if Path(source).is_dir() and kind_of(source) == "denoiser":
        snapshot = load_denoiser(source)
        name, denoiser = str(snapshot.path), snapshot.model
    elif not Path(source).exists() and family_of(source) is not None:
        torch.manual_seed(0)
        name, denoiser = f"{source} with random weights", create_model(source).eval()
        stir(denoiser)
    if kind_of(source) == "segmenter" or getattr(system_of(source), "task", None) == "segmentation":
        segmenter = open_segmenter(source)
        if not Path(source).exists():
            stir(segmenter.model)
        size, network = image_size or segmenter.image_size, SegmenterOutput(segmenter.model)
        return segmenter.name, portable_classifier(network, size, segmenter.model.model.in_chans)
    if denoiser is None:
        classifier = open_classifier(source)
        if not Path(source).exists():
            stir(classifier.emo)
        size, channels = image_size or classifier.image_size, classifier.emo.in_chans
        return classifier.name, portable_classifier(classifier.model, size, channels, dynamic_size=dynamic_size)
    if image_size is not None:
        raise InputError("`image_size` is for classifiers and segmenters; a denoiser has a sample size of its own")
    return name, portable_denoiser(denoiser)
