"""The task of training a segmenter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from d_emo.config import SegmenterSettings
from d_emo.data import spread
from d_emo.errors import InputError
from d_emo.files import replacing
from d_emo.io.card import describe_hardware
from d_emo.io.classifier import Normalized, open_classifier
from d_emo.io.snapshot import save_classifier
from d_emo.io.training_state import is_sharded
from d_emo.models import create_model
from d_emo.models.counting import trained_parameters
from d_emo.models.registry import check_kind, check_memory
from d_emo.segmentation.augment import TrainingCrops
from d_emo.segmentation.fundus import FundusFolder
from d_emo.segmentation.images import IGNORED, LabelledImages, LabelledScenes, MaskFolder
from d_emo.segmentation.losses import dice_loss
from d_emo.segmentation.measures import Quality, measure, segment
from d_emo.segmentation.networks import Segmenter
from d_emo.segmentation.pictures import overlay, palette, side_by_side, with_legend
from d_emo.segmentation.sliding import Windows
from d_emo.weights import load_weights

HELD_OUT = 200
"""Built-in pictures to measure on, at most."""
PICTURES = 6
"""Held-out images in the picture of a snapshot, their longer side at most `LARGEST` pixels."""
LARGEST = 1024
PLAIN = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation with which images in [-1, 1] stay as they are."""
PARTS = ("agreed", "truth", "predicted")


class SegmenterTask:
    """Cross-entropy of every pixel, of the auxiliary head's too, and the Dice loss, on crops of images with masks.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; data, a model or a classifier that cannot be opened.
    """

    smaller = "Choose fewer steps, smaller images or a GPU."

    def __init__(self, settings: SegmenterSettings):
        check_kind(settings.model, "segmenter")
        settings = settings.resolve()
        self.images, self.held_out = open_labelled(settings)
        self.facts = {"images": len(self.images)}
        self.settings = settings = settings.resolve(**self.facts)
        stride, self.windows = settings.stride, None
        if stride is not None:
            self.windows = Windows(settings.image_size, stride, settings.blend)
        self.dataset = TrainingCrops(
            self.images, settings.image_size, scale_range=tuple(settings.scale_range), colours=settings.colours,
            largest_share=settings.largest_share, flip=settings.flip, seed=settings.seed,
        )  # fmt: skip
        weights, count = settings.class_weights, len(self.images.class_names)
        if weights is not None and len(weights) != count:
            raise InputError(f"`class_weights` has {len(weights)} factors, and the data have {count} classes")
        self.class_weights = None if weights is None else torch.tensor(weights)
        options = settings.model_options or {}
        if taken := {"name", "num_classes", "in_channels"} & options.keys():
            raise InputError(f"`model_options`: {min(taken)} follows from the data or from `model`; leave it out")
        options = {"num_classes": len(self.images.class_names), **options}
        check_memory(settings.model, **options)
        torch.manual_seed(settings.seed)
        self.model: Segmenter = create_model(settings.model, **options)
        self.start, self.normalisation = "", PLAIN
        if settings.init_from is not None:
            self.start, self.normalisation = start_backbone(self.model, settings.init_from)
        if settings.freeze_backbone:
            self.model.freeze_backbone()
        self.input = Normalized(nn.Identity(), *self.normalisation)
        self.lr_scales = {name: settings.head_lr_scale for name, _ in self.model.named_parameters()
                          if not name.startswith(("backbone.", "decoder.neck."))}  # fmt: skip

    def introduction(self) -> list[str]:
        settings, millions = self.settings, trained_parameters(self.model) / 1e6
        held_out = "nothing" if self.held_out is None else f"{len(self.held_out):,}"
        return [
            f"{settings.model}: {millions:.2f} M trained parameters, {len(self.images.class_names)} classes; "
            f"{len(self.images):,} images of {self.images.name}, {held_out} held out; run folder "
            f"{settings.output_dir}",
            *filter(None, [self.start]),
        ]

    def keep_classes(self, recorded: Sequence[str] | None) -> None:
        if recorded is not None and list(recorded) != self.images.class_names:
            raise InputError("the classes of `data_dir` are not those that the run began with, in their order")

    def prepare(self, device: torch.device, folder: Path) -> None:
        self.input.to(device)

    def draw(self, generator: torch.Generator, batch_size: int) -> torch.Tensor:
        return torch.empty(batch_size, 0)  # crops draw their own

    def loss(self, model: nn.Module, batch: list[torch.Tensor], draws: torch.Tensor) -> dict[str, torch.Tensor]:
        images, masks = batch
        if len(images) == 1:
            raise InputError("batch norm of pooled maps needs two images at once; `micro_batch_size` must be 2 or more")
        given = model(self.input(images))
        weight = None if self.class_weights is None else self.class_weights.to(images.device)
        losses = {  # a mean over all pixels, as mmseg's: neither weights nor pixels without a class change the divisor
            name: F.cross_entropy(logits.float(), masks, weight, ignore_index=IGNORED, reduction="none").mean()
            for name, logits in given.items()
        }
        parts = {"aux_loss": losses["aux"]} if "aux" in losses else {}
        total = losses["out"] + self.settings.aux_weight * losses.get("aux", 0)
        if self.settings.dice_weight:
            parts["dice_loss"] = dice_loss(given["out"], masks)
            total = total + self.settings.dice_weight * parts["dice_loss"]
        return {"loss": total, **parts}

    def validate(self, model: nn.Module, *, rank: int, world_size: int) -> dict[str, torch.Tensor]:
        """Areas of each class over this process's held-out images, the sum of their losses, and their number."""
        mine = spread(len(self.held_out), self.settings.validate_images)[rank::world_size]
        areas, loss = self._measure(model, mine)
        sums = {f"{part} {label}": value for part, row in zip(PARTS, areas, strict=True)
                for label, value in enumerate(row)}  # fmt: skip
        device, numbers = next(model.parameters()).device, {"loss": loss, "count": len(mine)}
        return {name: torch.as_tensor(value, dtype=torch.float64, device=device)
                for name, value in {**sums, **numbers}.items()}  # fmt: skip

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        labels = range(len(self.images.class_names))
        quality = Quality.of(torch.tensor([[sums[f"{part} {label}"] for label in labels] for part in PARTS]))
        return {"loss": sums["loss"] / sums["count"], "mIoU": quality.mean_iou, "mDice": quality.mean_dice,
                "aAcc": quality.pixel_accuracy, "mAcc": quality.mean_accuracy}  # fmt: skip

    def remarks(self, count: Callable[[torch.Tensor], Any]) -> list[str]:
        return []

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings = self.settings
        meta: dict[str, Any] = {
            "step": step, "weights": "ema", "image_size": settings.image_size, "data": self.images.name,
            "class_names": self.images.class_names, "num_images": len(self.images),
            "normalisation": dict(zip(("mean", "std"), self.normalisation, strict=True)),
            "windows": self.windows and asdict(self.windows),
            "parameters": trained_parameters(self.model), "training_minutes": round(minutes, 1),
            "hardware": describe_hardware(next(model.parameters()).device),
        }
        if self.held_out is not None and not is_sharded(model):
            chosen = spread(len(self.held_out), settings.validate_images)
            meta["quality"] = asdict(Quality.of(self._measure(model, chosen)[0])) | {"images": len(chosen)}
        save_classifier(folder, model, meta=meta, settings=settings, kind="segmenter")

    def preview(self, path: Path, model: nn.Module) -> None:
        """Write held-out images (else those trained on), their truth and their prediction side by side."""
        images, colours, rows = self.held_out or self.images, palette(len(self.images.class_names)), []
        there: set[int] = set()
        for index in spread(len(images), PICTURES):
            image, truth = images[index]
            found = segment(self._as_trained(model), image, self.size, windows=self.windows).argmax(dim=0)
            rows.append([image.permute(1, 2, 0).numpy(), overlay(image, truth, colours),
                         overlay(image, found, colours)])  # fmt: skip
            there.update(truth.unique().tolist(), found.unique().tolist())
        picture = side_by_side(rows, LARGEST, ("image", "truth", "found"))
        with replacing(path) as temporary:
            self._with_legend(picture, there).save(temporary, format="PNG")

    @property
    def size(self) -> int | None:
        """Pixels of the shorter side of a measured image; None, its own, where it is measured window by window."""
        return None if self.windows else self.settings.image_size

    def picture(self, batch: list[torch.Tensor]) -> tuple[Image.Image, int]:
        """The first images of a batch of the data set beside their masks, and how many these are.

        Shape: (B, 3, H, W) in [-1, 1], (B, H, W).
        """
        images, masks = (part[:PICTURES].cpu() for part in batch)
        colours, pixels = palette(len(self.images.class_names)), ((images + 1) * 127.5).round().clamp(0, 255).byte()
        cells = [[image.permute(1, 2, 0).numpy(), overlay(image, mask, colours)]
                 for image, mask in zip(pixels, masks, strict=True)]  # fmt: skip
        rows = [sum(cells[start : start + 2], []) for start in range(0, len(cells), 2)]
        picture = side_by_side(rows, LARGEST, ("image", "mask") * min(2, len(cells)))
        return self._with_legend(picture, masks.unique().tolist()), len(images)

    def _with_legend(self, picture: Image.Image, labels: Iterable[int]) -> Image.Image:
        names = self.images.class_names
        return with_legend(picture, names, palette(len(names)), sorted(set(labels) - {IGNORED}))

    def _as_trained(self, model: nn.Module) -> Normalized:
        """The model with the normalisation that it is trained with before it."""
        return Normalized(model, *self.normalisation).to(next(model.parameters()).device)

    def _measure(self, model: nn.Module, indices: Sequence[int]) -> tuple[torch.Tensor, float]:
        areas, loss = measure(self._as_trained(model), self.held_out, self.size, indices, windows=self.windows)
        return areas.sums, loss


def open_labelled(settings: SegmenterSettings) -> tuple[LabelledImages, LabelledImages | None]:
    """The images to train on and those to measure on; InputError where they have other classes."""
    if settings.data_dir is None:
        size, dataset = settings.picture_size or settings.image_size, settings.dataset
        return (LabelledScenes(size, dataset=dataset, num_images=settings.num_images, seed=settings.seed),
                LabelledScenes(size, dataset=dataset, num_images=HELD_OUT, split="test"))
    images = open_folder(settings.data_dir, settings)
    if settings.validate_dir is None and not images.splits:
        if settings.validate_every is not None:
            raise InputError("`validate_every` needs held-out images: give their folder as `validate_dir`")
        return images, None
    held_out = open_folder(settings.validate_dir or settings.data_dir, settings, held_out=settings.validate_dir is None)
    if held_out.class_names != images.class_names:
        raise InputError(f"the classes of {settings.validate_dir} are not those of {settings.data_dir}, in their order")
    return images, held_out


def open_folder(folder: str, settings: SegmenterSettings, *, held_out: bool = False) -> MaskFolder | FundusFolder:
    """The images of a folder, in whatever layout; InputError for one that is not known."""
    if FundusFolder.fits(folder):
        return FundusFolder(
            folder, held_out=held_out, background=settings.background, field_of_view=settings.field_of_view
        )
    if settings.field_of_view:
        raise InputError(f"`field_of_view` is for the layouts of HRF and DRIVE, and {folder} is none of them")
    return MaskFolder(folder, held_out=held_out, background=settings.background)


def start_backbone(segmenter: Segmenter, source: str) -> tuple[str, tuple[Sequence[float], Sequence[float]]]:
    """Copy a classifier's weights into a segmenter's backbone, all but its last norm and head.

    Returns:
        What was done, in words, and the mean and standard deviation of the images that the classifier takes.

    Raises:
        InputError: It is no classifier, or of another size.
    """
    classifier, backbone = open_classifier(source), segmenter.backbone
    theirs, wanted = classifier.emo.config["name"], getattr(backbone, "config", {}).get("name", "none that classifies")
    if theirs != wanted:
        raise InputError(f"`init_from` {source} is {theirs}, and the backbone is {wanted}; choose another `model`")
    own = {name: value for name, value in classifier.emo.state_dict().items()
           if not name.startswith(("norm.", "head."))}  # fmt: skip
    load_weights(backbone, own, f"the classifier {source}")
    cfg = getattr(classifier.emo, "pretrained_cfg", None)
    return (f"the backbone starts from the weights of {classifier.name}",
            (tuple(cfg["mean"]), tuple(cfg["std"])) if cfg else PLAIN)  # fmt: skip
