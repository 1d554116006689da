"""Networks for use without Python: ONNX, torch.export and Core ML, each compared with PyTorch after it was written."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d_emo.errors import InputError, imported, unmet, write_error
from d_emo.files import filling
from d_emo.portable import (
    Portable,
    SegmenterOutput,
    open_portable,
    portable_classifier,
    portable_denoiser,
    portable_detector,
    stir,
)

__all__ = [
    "OPSET", "Portable", "SegmenterOutput", "detections_apart", "export", "open_portable", "portable_classifier",
    "portable_denoiser", "portable_detector", "stir", "write_onnx",
]  # fmt: skip

OPSET = 18
BATCHES = (1, 3)
"""Batch sizes that an exported network is compared at; it is traced with another one."""

ONE_FILE = 2_000_000_000
"""Bytes of weights beyond which an ONNX file keeps them in a second file, OUT.data: the format ends at 2 GiB."""


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
        InputError: for another ending, a path that cannot be written, a package that is not installed or is broken, or
            an option that the format does not have.
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
    except ImportError as error:  # within a library, such as of versions that do not fit together
        raise unmet(error) from None
    if run is None:
        return None
    cases = [*((batch,) for batch in BATCHES), *((1 + number % 3, size) for number, size in enumerate(network.sizes))]
    worst = 0.0
    for case in cases:
        inputs = network.example(*case)
        with torch.no_grad():
            expected = network.module(*inputs)
        if network.found:
            difference = detections_apart(run(*inputs), expected, max(inputs[0].shape))
        else:
            difference = ((run(*inputs) - expected).abs().max() / expected.abs().max()).item()
        worst = max(worst, difference) if math.isfinite(difference) else math.inf
    return worst


def detections_apart(found: Sequence[Tensor], expected: Sequence[Tensor], side: int) -> float:
    """How far what was found is from what was expected, in any order.

    Every expected object is compared with the nearest one of its label that was found.

    Args:
        found, expected: What `d_emo.portable.Detections` gives.
        side: The longer one of the image, in pixels; differences of boxes are told as a fraction of it.

    Shape: boxes (n, 4), scores (n,), labels (n,), masks (n, H, W).

    Returns:
        The largest difference of boxes and scores, and mean one of masks; infinite where other objects were found.
    """
    if [each.shape for each in found] != [each.shape for each in expected]:
        return math.inf
    worst = 0.0
    for box, score, label, *mask in zip(*expected, strict=True):
        apart = torch.maximum((found[0] - box).abs().amax(dim=1) / side, (found[1] - score).abs())  # (n,)
        apart[found[2] != label] = math.inf
        nearest = apart.argmin()
        worst = max(worst, apart[nearest].item(), *((found[3][nearest] - one).abs().mean().item() for one in mask))
    return worst


Runner = Callable[..., Any]
"""Runs a file that was written: tensors in, and out one, or those of ``Portable.found``."""


@torch.no_grad()
def traced(network: Portable) -> torch.export.ExportedProgram:
    """The network as a graph whose batch size is free and, with ``dynamic_size``, the images' height and width.

    Raises:
        InputError: The network decides by what it found, which such a graph cannot hold, or has too much to ask of free
            sides.
    """
    if network.found:
        raise InputError("`detections` is for .onnx files: non-maximum suppression decides by how much it was given, "
                         "which torch.export cannot follow")  # fmt: skip
    if network.older:
        raise InputError("`dynamic_size` of U-EMO is for .onnx files: torch.export does not come to an end with its "
                         "free sides in minutes")  # fmt: skip
    inputs, batch = network.example(2), torch.export.Dim("batch", min=1, max=4096)
    names = enumerate(("height", "width"))
    sides = {2 + i: torch.export.Dim(name, min=network.least, max=4096) for i, name in names}
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
        InputError: The versions that are here cannot write this ``opset``, or these layers in int8; int8 with
            detections.
    """
    onnxruntime = imported("onnxruntime", ".onnx files need onnxruntime", "d-emo[export]")
    for name in ("onnx", "onnxscript"):  # for torch.onnx
        imported(name, f".onnx files need {name}", "d-emo[export]")
    if int8 and network.found:
        raise InputError("`int8` moves scores across thresholds, so other objects are found; use it without "
                         "`detections`")  # fmt: skip
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    graph = _older(network) if network.found or network.older else _whole(network)
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(f=str(path), opset_version=opset or OPSET, input_names=list(network.input_names), **graph)
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
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of each output whose size the file does not know
    session = onnxruntime.InferenceSession(str(path), quiet, providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Any:
        feed = {name: tensor.numpy() for name, tensor in zip(network.input_names, tensors, strict=True)}
        outputs = tuple(map(torch.from_numpy, session.run(None, feed)))
        return outputs if network.found else outputs[0]

    return run


def _whole(network: Portable) -> dict[str, Any]:
    """Arguments of ``torch.onnx.export`` for a network that does the same for every image."""
    size = sum(parameter.nbytes for parameter in network.module.parameters())
    return {"model": traced(network), "dynamo": True, "output_names": ["output"], "external_data": size > ONE_FILE}


def _older(network: Portable) -> dict[str, Any]:
    """Those for PyTorch's older exporter, which follows a network through one example.

    It has torchvision's operators, where the newer one stops at ``batched_nms``, which chooses its way by the number of
    boxes; and it asks nothing of free sides, on which the newer one may reason for minutes.
    """
    sides = {1: "height", 2: "width"} if network.found else {0: "batch", 2: "height", 3: "width"}
    free = {name: sides for name in network.input_names} if network.dynamic_size else {}
    free |= {name: {0: "objects"} for name in network.found} or {"output": sides}
    return {"model": network.module, "args": network.example(2), "dynamo": False, "dynamic_axes": free,
            "output_names": list(network.found) or ["output"]}  # fmt: skip


def write_coreml(network: Portable, path: Path) -> Runner | None:
    """A Core ML package for batch 1, which only macOS can run; InputError where Core ML cannot express the network."""
    coremltools = imported("coremltools", "Core ML packages need coremltools", "d-emo[coreml]")
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
