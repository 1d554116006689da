"""The task of training a classifier."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from d_emo import checkpoint
from d_emo.config import ClassifierSettings, InputError
from d_emo.data import AugmentedFolder, CentreCroppedFolder, ClassImages, open_dataset
from d_emo.models import create_model
from d_emo.models.backbone import BACKBONES
from d_emo.models.registry import resolve_name
from d_emo.training.accuracy import Accuracy, measure_accuracy
from d_emo.training.teacher import distillation_loss, load_teacher

BUILT_IN_HELD_OUT = 2000
"""Images of a built-in data set that a snapshot is measured on, at most."""


class Augmentation(NamedTuple):
    """Random changes to the images of a step."""

    flip: torch.Tensor  # (B,) bool
    shift: torch.Tensor  # (B, 2), as shares of half the image side

    def __getitem__(self, rows: slice) -> Augmentation:  # type: ignore[override]
        return Augmentation(*(field[rows] for field in self._asdict().values()))


class ClassifierTask:
    """Cross-entropy with label smoothing, and optionally a teacher's soft logits, on augmented images.

    Images of a folder are cropped at random and pass RandAugment; those of built-in data sets are randomly shifted.
    Images are mirrored where the data allow it.

    Args:
        settings: Resolved settings.

    Raises:
        InputError: Settings that cannot work together; a data set or model that cannot be opened.
    """

    lr_scales: dict[str, float] = {}
    smaller = "Choose fewer --max-steps, a smaller --image-size or a GPU."

    def __init__(self, settings: ClassifierSettings):
        if resolve_name(settings.model) not in BACKBONES:
            raise InputError(f"{settings.model} is a denoiser; train it with scripts/train_dit.py")
        self.settings = settings
        self.dataset, self.held_out = open_train(settings), open_held_out(settings)
        self._check_classes()
        if settings.epochs is not None:
            per_epoch = len(self.dataset) / settings.batch_size
            settings.max_steps = max(1, round(settings.epochs * per_epoch))
            settings.warmup_steps = round(min(settings.warmup_epochs, settings.epochs / 10) * per_epoch)
        torch.manual_seed(settings.seed)
        given = {"num_classes": len(self.dataset.class_names), "img_size": settings.image_size}
        self.model = create_model(settings.model, **{**given, **(settings.model_options or {})})
        self.teacher = None
        if settings.teacher is not None:
            self.teacher = load_teacher(settings.teacher, settings.teacher_weights, len(self.dataset.class_names))

    def _check_classes(self) -> None:
        names = self.dataset.class_names
        if len(names) < 2:
            raise InputError(f"{self.settings.data_dir} has only the class {names[0]}; a classifier needs two or more")
        if self.held_out is not None and self.held_out.class_names != names:
            odd = sorted(set(names) ^ set(self.held_out.class_names))
            raise InputError(
                f"the folders of training and validation images have other classes: only one of them has {odd[:3]}"
            )

    def introduction(self) -> list[str]:
        settings = self.settings
        return [
            f"{settings.model} on {settings.data_dir or settings.dataset}: {len(self.dataset):,} images, "
            f"{len(self.dataset.class_names)} classes, {settings.image_size} px; run folder {settings.output_dir}",
            *([] if settings.teacher is None else [f"teacher: {settings.teacher}"]),
        ]

    def prepare(self, device: torch.device, folder: Path) -> None:
        """Images are read as they are needed; only the teacher has to move."""
        if self.teacher is not None:
            self.teacher.to(device)

    def draw(self, generator: torch.Generator, batch_size: int) -> Augmentation:
        device = generator.device
        return Augmentation(
            flip=(torch.rand(batch_size, generator=generator, device=device) < 0.5) & self.dataset.flip,
            shift=(torch.rand(batch_size, 2, generator=generator, device=device) * 4 - 2) * self.settings.shift,
        )

    def loss(self, model: nn.Module, batch: list[torch.Tensor], draws: Augmentation) -> dict[str, torch.Tensor]:
        settings, (images, labels) = self.settings, batch
        images = augment(images, draws)
        logits = model(images).float()
        losses = {"loss": F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)}
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher(images)
            losses["distillation"] = distillation_loss(logits, wanted, settings.distill_tau)
            losses["loss"] = losses["loss"] + settings.distill_weight * losses["distillation"]
        return {**losses, "accuracy": (logits.argmax(dim=1) == labels).float().mean()}

    def save_snapshot(self, folder: Path, model: nn.Module, *, step: int, minutes: float) -> None:
        settings = self.settings
        meta: dict[str, Any] = {
            "step": step, "weights": "ema", "image_size": settings.image_size, "data": self.dataset.name,
            "class_names": self.dataset.class_names, "training_minutes": round(minutes, 1),
        }
        held_out = ""
        if self.held_out is not None:
            measured = {"ema": self.measure(model), "raw": self.measure(self.model)}
            meta["accuracy"] = {weights: asdict(each) for weights, each in measured.items()}
            meta["held_out_accuracy"] = round(measured["ema"].top1, 4)
            held_out = f"""* Accuracy on held-out images (the EMA's top-1: {meta["held_out_accuracy"]:.2%}):
  * EMA weights: {measured["ema"]}.
  * Raw weights: {measured["raw"]}.
"""
        card = f"""# {settings.model} on {settings.data_dir or settings.dataset}, {settings.image_size} px

* Training: {step:,} steps of batch {settings.batch_size}, {minutes:.1f} minutes.
* Weights: moving average (EMA, decay {settings.ema_decay}) of parameters and BatchNorm statistics.
{held_out}"""
        checkpoint.save_classifier(folder, model, meta=meta, settings=settings, card=card)

    def measure(self, model: nn.Module) -> Accuracy:
        """Accuracy of ``model`` on the held-out images."""
        built_in = self.settings.data_dir is None
        return measure_accuracy(
            model, self.held_out, limit=BUILT_IN_HELD_OUT if built_in else None,
            num_workers=self.settings.num_workers or 0,
        )


def augment(images: torch.Tensor, draws: Augmentation) -> torch.Tensor:
    """Mirror and translate, repeating the border. Shape: (B, 3, H, W) -> same."""
    images = torch.where(draws.flip[:, None, None, None], images.flip(-1), images)
    if not draws.shift.any():
        return images
    matrix = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)
    matrix[:, :, 2] = draws.shift
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def open_train(settings: ClassifierSettings) -> ClassImages:
    """The training images that the settings name."""
    if settings.data_dir is None:
        return open_dataset(
            dataset=settings.dataset, data_dir=None, image_size=settings.image_size, num_images=settings.num_images
        )
    policy = None if settings.rand_augment == "none" else settings.rand_augment
    return AugmentedFolder(
        _train_and_val(settings)[0], settings.image_size, crop_scale=settings.crop_scale, rand_augment=policy,
        seed=settings.seed, skip_corrupt=settings.skip_corrupt,
    )  # fmt: skip


def open_held_out(settings: ClassifierSettings) -> ClassImages | None:
    """The images to measure accuracy on, or None where a folder comes without."""
    if settings.data_dir is None:
        return open_dataset(dataset=settings.dataset, data_dir=None, image_size=settings.image_size, split="test")
    folder = _train_and_val(settings)[1]
    if folder is None:
        return None
    return CentreCroppedFolder(
        folder, settings.image_size, crop_share=settings.crop_share, skip_corrupt=settings.skip_corrupt
    )


def _train_and_val(settings: ClassifierSettings) -> tuple[Path, Path | None]:
    """The folder itself, or its sub-folders train and val where it has both, as ImageNet is laid out."""
    root, val = Path(settings.data_dir), settings.val_dir
    if (root / "train").is_dir() and (root / "val").is_dir():
        return root / "train", Path(val) if val else root / "val"
    return root, Path(val) if val else None
