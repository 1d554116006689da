"""Networks as plain functions of tensors, for use without Python: what leaves, and inputs to try it with."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from d_emo.detection.features import Detector
from d_emo.errors import InputError
from d_emo.io.classifier import open_classifier
from d_emo.io.segmenter import open_segmenter
from d_emo.io.snapshot import kind_of, load_classifier, load_denoiser
from d_emo.io.video import open_video_classifier
from d_emo.models import create_model, list_models
from d_emo.models.contract import DenoiserFrame
from d_emo.models.layers import batch_norms, fold_batch_norms, pair, sizes
from d_emo.models.registry import model_kind
from d_emo.segmentation.unet import UNetBackbone

SIZES = ((33, 40), (64, 96), (97, 75), (160, 224), (256, 256))
"""Heights and widths that a network with free ones is compared at; a side of 32 px is one token, which is fixed."""

STRIDE = 32
"""Of the last map of every backbone: torchvision fills up the sides of images to its multiples."""


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
    """A detector without thresholds and non-maximum suppression.

    RetinaNet looks at images as they are, SSDLite at a square of its own side.

    Args:
        detector: One with a single stage.
        size: Height and width of all images, whose anchors are then kept; None where they are free.
        side: Of the square that images are resized to; None leaves them.

    Shape: images (B, 3, H, W) in [0, 1] -> (B, anchors, 4 + classes): boxes in pixels, not clipped to the image.
    """

    def __init__(self, detector: Detector, size: tuple[int, int] | None, side: int | None) -> None:
        super().__init__()
        self.detector, self.side = detector, side
        stated = (torch.tensor(each)[:, None, None] for each in (detector.transform.image_mean,
                                                                 detector.transform.image_std))  # fmt: skip
        for name, value in zip(("mean", "std"), stated, strict=True):
            self.register_buffer(name, value)
        self.anchors: Tensor | None
        self.register_buffer("anchors", None)
        known = size if side is None else (side, side)
        if known is not None:
            with torch.no_grad():
                images = self.prepared(torch.zeros(1, 3, *known))
                self.anchors = self.anchors_of(images, list(detector.backbone(images).values()))

    def prepared(self, images: Tensor) -> Tensor:
        """What the network sees of images. Shape: (B, 3, H, W) -> (B, 3, H', W')."""
        images = (images - self.mean) / self.std
        if self.side is not None:
            return F.interpolate(images, (self.side, self.side), mode="bilinear")
        return F.pad(images, (0, -images.shape[3] % STRIDE, 0, -images.shape[2] % STRIDE))

    def anchors_of(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """The anchors of each image. Shape: (B, 3, H', W'), maps (B, C, h, w) -> (anchors, 4)."""
        return self.detector.anchor_generator(ImageList(images, [tuple(images.shape[2:])]), maps)[0]

    def forward(self, images: Tensor) -> Tensor:
        seen = self.prepared(images)
        maps = list(self.detector.backbone(seen).values())
        outputs = self.detector.head(maps)
        logits, deltas = outputs["cls_logits"], outputs["bbox_regression"]  # (B, anchors, classes), (B, anchors, 4)
        anchors = self.anchors_of(seen, maps) if self.anchors is None else self.anchors
        anchors = anchors.expand(images.shape[0], -1, -1).flatten(0, 1)
        boxes = self.detector.box_coder.decode_single(deltas.flatten(0, 1), anchors).unflatten(0, (-1, deltas.shape[1]))
        if self.side is not None:
            height, width = (n / self.side for n in images.shape[2:])
            boxes = torch.stack([boxes[..., i] * (height if i % 2 else width) for i in range(4)], dim=2)
        background = self.detector.first_label  # softmax with one, sigmoid without
        scores = logits.softmax(dim=2)[:, :, 1:] if background else logits.sigmoid()
        return torch.cat([boxes, scores], dim=2)  # (B, anchors, 4 + classes)


class Detections(nn.Module):
    """What a detector finds in one image, as torchvision decides it: resized, thresholds, non-maximum suppression.

    Shape: image (3, H, W) in [0, 1] -> boxes (n, 4) in pixels, scores (n,), labels (n,) from 0, masks (n, H, W).
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.detector([image])
        masks = (found["masks"][:, 0],) if "masks" in found else ()
        return found["boxes"], found["scores"], found["labels"] - self.detector.first_label, *masks


class SegmenterOutput(nn.Module):
    """A segmenter as a plain function of images. Shape: (B, 3, H, W) -> (B, num_classes, H, W)."""

    def __init__(self, segmenter: nn.Module) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter(images)["out"]


@dataclass(frozen=True)
class Portable:
    """A network ready for export: a plain module in eval mode, batch norms folded, and inputs to try it with.

    Attributes:
        example: Gives inputs of a batch size and, where the sides are free, height and width.
        meaning: Of the inputs, for whoever has to make them.
        dynamic_size: Whether height and width are free, as the batch is.
        least: The smallest free side: where a map has one row, an exported graph has the number 1.
        found: Names of outputs whose number of rows depends on what is in the one image that it takes.
        older: Whether only PyTorch's older exporter of ONNX comes to an end with it.
    """

    module: nn.Module
    input_names: tuple[str, ...]
    example: Callable[..., tuple[Tensor, ...]]
    meaning: str
    dynamic_size: bool = False
    least: int = STRIDE + 1
    found: tuple[str, ...] = ()
    older: bool = False

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths to compare at where they are free."""
        tried = SIZES if self.dynamic_size else ()
        return tuple((max(height, self.least), max(width, self.least)) for height, width in tried)


def portable_classifier(
    network: nn.Module, image_size: int | Sequence[int], channels: int = 3, *, dynamic_size: bool = False
) -> Portable:
    """A classifier of images or clips in [-1, 1], on a copy.

    Args:
        network: an `EMO`, or a module around one.
        image_size: side of square images in pixels, or height and width; of a clip frames, height and width.
        channels: of the images.
        dynamic_size: whether the exported network shall take any other size too.
    """
    size = image_size if isinstance(image_size, int) else list(image_size)
    own = sizes(size, "image_size", 3) if isinstance(size, list) and len(size) == 3 else pair(size, "image_size")

    def example(batch: int, size: Sequence[int] = own) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.rand(batch, channels, *size, generator=generator) * 2 - 1,)

    folded = fold_batch_norms(copy.deepcopy(network).cpu().float().eval())
    inputs = ("images", "images are in [-1, 1]") if len(own) == 2 else ("clips", "frames of clips are in [-1, 1]")
    # U-EMO's maps are halved four times, padded to windows and cut again: torch.export reasons for minutes
    older = dynamic_size and any(isinstance(each, UNetBackbone) and each.window for each in network.modules())
    return Portable(folded, inputs[:1], example, inputs[1], dynamic_size, older=older)


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


def portable_detector(
    detector: Detector, image_size: Sequence[int] | int | None = None, *, dynamic_size: bool = False,
    detections: bool = False,
) -> Portable:  # fmt: skip
    """A detector up to its boxes and scores, or with ``detections`` up to what it finds, on a copy.

    Args:
        detector: One of ours; without ``detections`` one with a single stage.
        image_size: Side of the square images in pixels, or height and width. Default: its own.
        dynamic_size: Whether the exported network shall take any other size too.
        detections: Add thresholds and non-maximum suppression, for one image at a time.

    Raises:
        InputError: A detector whose second stage depends on what the first one found, without ``detections``; images
            of SSDLite that are no square.
    """
    if hasattr(detector, "roi_heads") and not detections:
        raise InputError(
            "Mask R-CNN looks at the regions that it found, and has no boxes and scores before that; export it with "
            "`detections`, or SSDLite or RetinaNet"
        )
    side = (detector.transform.fixed_size or (None,))[0]  # SSDLite's
    size = pair(image_size or side or detector.transform.min_size[-1], "image_size")
    if side and not dynamic_size and not detections and size[0] != size[1]:
        raise InputError(f"`image_size` of SSDLite must be one side, not {size[0]} and {size[1]}, but with "
                         "`dynamic_size`")  # fmt: skip
    folded = fold_batch_norms(copy.deepcopy(detector).cpu().float().eval())

    def smooth(batch: int, size: Sequence[int] = size) -> Tensor:
        """Images of blobs: in noise there is nothing to find."""
        noise = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))
        return F.interpolate(noise, tuple(size), mode="bicubic").clamp(0, 1)

    if detections:
        found = ("boxes", "scores", "labels", *(["masks"] if hasattr(detector, "roi_heads") else []))
        meaning = "one image in [0, 1]; boxes are left, top, right, bottom in its pixels, labels start at 0"
        return Portable(
            Detections(folded).eval(), ("image",), lambda *case: (smooth(*case)[0],), meaning, dynamic_size, found=found
        )
    square = side and (side if dynamic_size else size[0])
    module = BoxesAndScores(folded, None if dynamic_size else size, square)
    meaning = "images are in [0, 1]; of every anchor left, top, right, bottom in pixels, then a score for each class"
    least = STRIDE + 1 if side else 4 * STRIDE + 1  # RetinaNet's last map has a stride of 128
    return Portable(module.eval(), ("images",), lambda *case: (smooth(*case),), meaning, dynamic_size, least=least)


@torch.no_grad()
def stir(model: nn.Module, forward: Callable[[], object] | None = None) -> None:
    """Give a new network values all of which its output shows: it starts with closed gates and plain batch norms.

    Args:
        model: The network, changed in place.
        forward: Runs it, for the statistics of batch norms. Default: random ones, behind which little is left of an
            image in a network with many.
    """
    for parameter in model.parameters():
        if (largest := parameter.abs().max()) < 1e-2:
            parameter.normal_(std=0.1 if largest < 1e-3 else 0.02)  # gates; SSDLite's heads, of many channels
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    norms = [(norm, norm.momentum, norm.training) for norm in (batch_norms(model) if forward else ())]
    for norm, _, _ in norms:
        norm.train().momentum = 1.0
    if forward:
        forward()
    for norm, momentum, training in norms:
        norm.train(training).momentum = momentum


def kind_of_name(source: str) -> str | None:
    """What a name stands for, see `model_kind`; None for what is no name of a network."""
    return model_kind(source) if source.replace("/", "-").lower() in map(str.lower, list_models()) else None


def open_portable(
    source: str, image_size: int | Sequence[int] | None = None, *, dynamic_size: bool = False, detections: bool = False
) -> tuple[str, Portable]:
    """What it is called, and the network: a snapshot or run folder, a released file, a timm folder or a model's name.

    Raises:
        InputError: if it is none of them, image sizes are spoken of for a denoiser, or ``detections`` for another
            network than a detector.
    """
    there, stored = Path(source).exists(), kind_of(source)
    kind = stored or (None if there else kind_of_name(source))
    if detections and kind != "detector":
        raise InputError("`detections` is for detectors")
    if kind == "denoiser":
        for name, given in (("image_size", image_size is not None), ("dynamic_size", dynamic_size)):
            if given:
                raise InputError(f"`{name}` is for classifiers, segmenters and detectors; a denoiser has a sample size "
                                 "of its own")  # fmt: skip
    torch.manual_seed(0)
    if kind == "detector":
        if stored:
            snapshot = load_classifier(source, "detector")
            name, detector = str(snapshot.path), snapshot.model
        else:
            name, detector = f"{source} with random weights", create_model(source).eval()
            stir(detector, lambda: detector.dense_outputs(torch.randn(2, 3, 128, 128)))
        return name, portable_detector(detector, image_size, dynamic_size=dynamic_size, detections=detections)
    if kind == "segmenter":
        segmenter = open_segmenter(source)
        network = segmenter.model.model
        if not stored:
            stir(network, lambda: network.logits(torch.randn(2, network.in_chans, 128, 128)))
        return segmenter.name, portable_classifier(
            SegmenterOutput(segmenter.model), image_size or segmenter.image_size, network.in_chans,
            dynamic_size=dynamic_size,
        )  # fmt: skip
    if kind == "denoiser":
        if stored:
            snapshot = load_denoiser(source)
            return str(snapshot.path), portable_denoiser(snapshot.model)
        denoiser = create_model(source).eval()
        stir(denoiser)
        return f"{source} with random weights", portable_denoiser(denoiser)
    if kind == "video classifier":
        if dynamic_size:
            raise InputError("`dynamic_size` is for images; a video classifier takes clips of one size")
        if stored:
            opened = open_video_classifier(source)
            name, network, clip = opened.name, opened.model, (opened.sampler.frames, *[opened.image_size] * 2)
        else:
            name, network = f"{source} with random weights", create_model(source).eval()
            stir(network)
            clip = network.input_size
        side = pair(image_size, "image_size") if image_size else clip[1:]
        return name, portable_classifier(network, (clip[0], *side))
    classifier = open_classifier(source)
    if not there:
        stir(classifier.emo)
    size, channels = image_size or classifier.image_size, classifier.emo.in_chans
    return classifier.name, portable_classifier(classifier.model, size, channels, dynamic_size=dynamic_size)
