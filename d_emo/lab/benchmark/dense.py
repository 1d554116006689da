"""Detectors and segmenters beside torchvision's small ones: up to raw outputs, and from a picture to its objects."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from d_emo.config import DenseBenchmarkSettings
from d_emo.errors import InputError, imported
from d_emo.lab.benchmark.cases import classify
from d_emo.lab.benchmark.report import machine
from d_emo.lab.benchmark.timing import Case, measure
from d_emo.models import count_macs, count_parameters, create_model
from d_emo.models.layers import fold_batch_norms
from d_emo.portable import stir
from d_emo.tables import system_of
from d_emo.text import markdown_table

CLASSES = {"detection": 90, "segmentation": 21}
"""Of every network that is compared, without the background of a detector: those of torchvision's weights."""

CANDIDATES = 1000
"""Boxes with a class that reach a detector's non-maximum suppression, whose time depends on their number."""


class RawOutputs(nn.Module):
    """A detector up to its heads, or a segmenter up to its logits. Shape: (B, 3, H, W) -> (B, ...)."""

    in_chans = 3

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.network, "anchor_generator"):
            return self.network(images)["out"]  # (B, classes, H, W)
        outputs = self.network.head(list(self.network.backbone(images).values()))
        return torch.cat([outputs["cls_logits"], outputs["bbox_regression"]], dim=2)  # (B, anchors, logits + 4)


class Answers(nn.Module):
    """From a picture to what is in it, as torchvision does it: boxes, scores and labels, or the class of each pixel.

    A detector's threshold is moved to where `CANDIDATES` of its boxes with a class are above it in the picture: with
    random weights its own lets all of them through, or none. Everybody suppresses boxes that overlap by more than half,
    and keeps at most 100.

    Args:
        network: Ours or torchvision's, in eval mode.
        picture: To set the threshold by.

    Shape: picture (3, H, W); (B, 3, H, W) in [0, 1] -> boxes, scores and labels of each, or classes (B, H, W).
    """

    def __init__(self, network: nn.Module, picture: Tensor) -> None:
        super().__init__()
        self.network = network
        if self.detects:
            asked = CANDIDATES + 1
            self._keep(score_thresh=-1.0, nms_thresh=1.0, topk_candidates=asked, detections_per_img=asked)
            with torch.no_grad():
                least = network([picture])[0]["scores"][-1].item()
            self._keep(score_thresh=least, nms_thresh=0.5, topk_candidates=asked, detections_per_img=100)

    def _keep(self, **thresholds: float) -> None:
        for name, value in thresholds.items():
            setattr(self.network, name, value)

    @property
    def detects(self) -> bool:
        """Whether it answers with boxes."""
        return hasattr(self.network, "anchor_generator")

    def forward(self, images: Tensor) -> Any:
        return self.network(list(images)) if self.detects else self.network(images)["out"].argmax(dim=1)


def ours(name: str) -> tuple[str, RawOutputs]:
    """What one of our networks does, and the network; InputError for one that is neither or has two stages."""
    task = getattr(system_of(name), "task", None)
    if task is None or name.lower().startswith("maskrcnn"):
        raise InputError(f"`models` {name!r} is no segmenter, and no detector of a single stage")
    network = create_model(name, num_classes=CLASSES[task]).eval()
    stir(network)
    return task, RawOutputs(network).eval()


def theirs(name: str) -> tuple[str, RawOutputs]:
    """What one of torchvision's networks does, and the network; InputError for a name that is none of these."""
    for task in CLASSES:
        if name in torchvision.models.list_models(module=getattr(torchvision.models, task)):
            classes = CLASSES[task] + (task == "detection" and "retinanet" not in name and "fcos" not in name)
            network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes)
            if hasattr(network, "roi_heads"):
                break
            raw = RawOutputs(network).eval()
            stir(network, partial(raw, torch.randn(2, 3, 320, 320)))
            return task, raw
    raise InputError(f"`peers` {name!r} is no segmenter of torchvision, and no detector of a single stage")


def fuse(network: nn.Module) -> nn.Module:
    """Absorb batch norms of a network of torchvision into the convolutions before them; in place."""
    for module in [each for each in network.modules() if isinstance(each, nn.Sequential)]:
        for (place, conv), (after, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, place, fuse_conv_bn_eval(conv, norm))
                setattr(module, after, nn.Identity())
    return network


@torch.no_grad()
def exported(network: nn.Module, images: Tensor) -> bytes:
    """An ONNX file's content, by PyTorch's older exporter, which takes seconds. Shape: images (B, 3, H, W)."""
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (images,), file, dynamo=False, opset_version=18, input_names=["images"])
    return file.getvalue()


def opened_file(content: bytes, images: Tensor, threads: int) -> Callable[[], object]:
    """A function that runs an ONNX file in onnxruntime. Shape: images (B, 3, H, W)."""
    onnxruntime = imported("onnxruntime", "ONNX files are run by onnxruntime", "d-emo[export]")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": images.numpy()})


def dense_table(settings: DenseBenchmarkSettings) -> str:
    """Markdown: parameters, MACs and milliseconds of every network on one image, by number of threads.

    Raises:
        InputError: A name that is none of a segmenter or a detector of a single stage.
    """
    torch.manual_seed(0)
    side, images = settings.image_size, torch.rand(1, 3, settings.image_size, settings.image_size)
    opened = {name: ours(name) for name in settings.models} | {name: theirs(name) for name in settings.peers}
    facts = {
        name: [task, name, f"{count_parameters(network):,}", f"{count_macs(network, side) / 1e9:.2f}G"]
        for name, (task, network) in opened.items()
    }
    for name, (_, network) in opened.items():
        (fold_batch_norms if name in settings.models else fuse)(network)
    answers = {name: Answers(network.network, images[0]).eval() for name, (_, network) in opened.items()}
    runtimes = ["PyTorch", *(["onnxruntime"] if find_spec("onnxruntime") and find_spec("onnx") else [])]
    files = {name: exported(network, images) for name, (_, network) in opened.items()} if runtimes[1:] else {}
    whole = "PyTorch, to boxes or classes"
    columns, before = [], torch.get_num_threads()
    try:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            cases = []
            for name, (_, network) in opened.items():
                runs = [classify(network, images, both=True)]
                runs += [opened_file(files[name], images, threads) for _ in runtimes[1:]]
                cases += [Case(runtime, name, run) for runtime, run in zip(runtimes, runs, strict=True)]
                cases.append(Case(whole, name, classify(answers[name], images, both=True)))
            measure(cases, rounds=settings.rounds, device=torch.device("cpu"), clock=settings.clock)
            columns += [(f"{runtime}, {threads} thread{'s' * (threads > 1)}", [case for case in cases
                         if case.group == runtime]) for runtime in (*runtimes, whole)]  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for _, cases in columns:
        for case in cases:
            facts[case.name].append("{:.1f} ({:.1f} to {:.1f})".format(*(1e3 * s for s in (case.median, *case.spread))))
    rows = sorted(facts.values(), key=lambda row: list(CLASSES).index(row[0]))
    head = ["raw outputs of", f"network at {side} px", "parameters", "MACs", *(f"{title}, ms" for title, _ in columns)]
    where = machine(torch.device("cpu"))
    about = f"{where['device']}, PyTorch {where['torch']}, {settings.clock} time"
    return f"{markdown_table(head, rows, words=2)}\n\n{about}, medians and quartiles of {settings.rounds} in turns"
